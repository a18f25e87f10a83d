"""The optimizer's weights are the model's, in each ZeRO stage, and ZeRO 3's gradients are not copied for the update."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from distributed import run_ranks
from operations import Operations
from toy import ALTERNATING, make, plain, play, rows_of

from megavtp.parallel.engine_state import flat_partitions, stored
from megavtp.parallel.master_weights import joined
from megavtp.parallel.mesh import build_mesh


def _trained(rank: int, zero: int) -> tuple[set[int], set[int], float]:
    engine, module = make(build_mesh(1, 1), zero, clip=0.5)
    script = [ALTERNATING] * 3
    difference = play(engine, module, script[:2]).difference(plain(script[:2], clip=0.5))
    weights = {stored(p).untyped_storage().data_ptr() for p in module.parameters() if p.requires_grad}
    masters = {flat.untyped_storage().data_ptr() for flat in flat_partitions(engine._engine)}
    # What was saved is loaded into both, and the run goes on.
    saved = {name: value.clone() for name, value in engine.export(lambda number: True).items()}
    with torch.no_grad():
        for flat in flat_partitions(engine._engine):
            flat.zero_()
    engine.load(saved.__getitem__, 2)
    last = play(engine, module, script[2:], first=2)
    expected = plain(script, clip=0.5)
    expected.norms = expected.norms[2:]
    engine.close()
    return weights, masters, max(difference, last.difference(expected))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_they_are_one(zero: int, ranks: int) -> None:
    for weights, masters, difference in run_ranks(ranks, _trained, zero, timeout=120):
        assert masters <= weights and difference < 1e-6


def _copied_for_an_update(rank: int) -> Counter[str]:
    engine, _ = make(build_mesh(1, 1), 3, clip=0.5)
    engine.begin_step()
    engine.backward(engine("a", rows_of(0, "a", engine.mesh)[0]).square().mean())
    with Operations() as operations:
        engine.step()
    engine.close()
    return operations.calls


def test_zero_3_copies_nothing_for_the_update() -> None:
    for calls in run_ranks(2, _copied_for_an_update, timeout=120):
        assert calls["addcdiv_"] and not calls["cat"], calls


def test_neighbours_are_joined_without_a_copy() -> None:
    whole = torch.arange(12.0)
    parts = [whole[:4], whole[4:10].view(2, 3), whole[10:]]
    assert joined(parts).data_ptr() == whole.data_ptr() and torch.equal(joined(parts), whole)
    middle = joined(parts[1:])
    assert middle.data_ptr() == parts[1].data_ptr() and torch.equal(middle, whole[4:])
    without_data = torch.empty(12, device="meta")
    assert joined(list(without_data.split(4)))._is_view()


@pytest.mark.parametrize("parts", [
    [torch.arange(3.0), torch.arange(3.0, 6.0)],  # of two storages
    [torch.arange(6.0)[3:], torch.arange(6.0)[:3]],
    [torch.arange(6.0).view(2, 3).T],  # not contiguous
])
def test_others_are_copied(parts: list[torch.Tensor]) -> None:
    assert torch.equal(joined(parts), torch.cat([part.reshape(-1) for part in parts]))
    assert joined(parts).data_ptr() != parts[0].data_ptr()
