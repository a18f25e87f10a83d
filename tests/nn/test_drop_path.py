import pytest
import torch

from megavtp.nn.drop_path import BranchDrop, DropPlan, add_branch, draw_drop_plan

DRAW = dict(seed=3, step=7, tag="ssl", depth=2, rate=0.3, global_sizes=[12, 20])


def branches(plan):
    return [branch for block in plan.blocks for branch in block]


def test_rate_zero_has_no_plan():
    assert draw_drop_plan(**{**DRAW, "rate": 0.0}, local_rows=[torch.arange(12), torch.arange(20)]) is None


def test_counts_and_scales():
    plan = draw_drop_plan(**DRAW, local_rows=[torch.arange(12), torch.arange(20)])
    assert len(plan.blocks) == 2
    for branch in branches(plan):
        assert [len(rows) for rows in branch.rows] == [8, 14]
        assert branch.scales == (12 / 8, 20 / 14)
    kept = [tuple(branch.rows[0].tolist()) for branch in branches(plan)]
    assert len(set(kept)) == 4, "every branch draws for itself"


def test_at_least_one_sequence_is_kept():
    plan = draw_drop_plan(**{**DRAW, "rate": 0.99}, local_rows=[torch.arange(12), torch.arange(20)])
    assert all(len(rows) == 1 for branch in branches(plan) for rows in branch.rows)


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 8}, {"tag": "rec"}])
def test_draw_depends_on_seed_step_and_tag(change):
    rows = [torch.arange(12), torch.arange(20)]
    one, same, other = (draw_drop_plan(**d, local_rows=rows) for d in (DRAW, DRAW, {**DRAW, **change}))
    lists = [[rows.tolist() for branch in branches(p) for rows in branch.rows] for p in (one, same, other)]
    assert lists[0] == lists[1] != lists[2]


def test_parts_of_the_batch_add_up_to_the_whole_draw():
    whole = draw_drop_plan(**DRAW, local_rows=[torch.arange(12), torch.arange(20)])
    parts = [
        [torch.tensor([0, 3, 6, 9]), torch.arange(5)], [torch.tensor([1, 2, 4, 5, 7, 8, 10, 11]), torch.arange(5, 20)],
    ]
    plans = [draw_drop_plan(**DRAW, local_rows=part) for part in parts]
    for number, branch in enumerate(branches(whole)):
        for segment in range(2):
            found = torch.cat([part[segment][branches(plan)[number].rows[segment]] for part, plan in zip(parts, plans)])
            assert torch.equal(found.sort().values, branch.rows[segment])
            assert all(branches(plan)[number].scales == branch.scales for plan in plans)


def test_draw_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    draw_drop_plan(**{**DRAW, "seed": 99}, local_rows=[torch.arange(12), torch.arange(20)])
    assert torch.equal(state, torch.get_rng_state())


def test_to_keeps_structure():
    plan = draw_drop_plan(**DRAW, local_rows=[torch.arange(12), torch.tensor([], dtype=torch.long)])
    moved = plan.to("cpu")
    assert isinstance(moved, DropPlan)
    for a, b in zip(branches(plan), branches(moved)):
        assert a.scales == b.scales and all(torch.equal(x, y) for x, y in zip(a.rows, b.rows))


def test_branch_runs_on_kept_sequences_and_is_scaled():
    segments, weight = ((3, 2), (2, 4)), torch.randn(5, 5)
    x = torch.randn(14, 5)
    drop = BranchDrop((torch.tensor([2, 0]), torch.tensor([1])), (1.5, 2.0))
    seen = []

    def branch(y, kept, _):
        seen.append((y, kept))
        return (y @ weight).to(torch.bfloat16)

    out = add_branch(x, branch, segments, drop)
    expected = x.clone()
    for start, end, scale in ((4, 6, 1.5), (0, 2, 1.5), (10, 14, 2.0)):
        expected[start:end] += scale * (x[start:end] @ weight).bfloat16().float()
    assert out.dtype == torch.float32
    assert torch.allclose(out, expected, atol=1e-6)
    assert seen[0][1] == ((2, 2), (1, 4)) and torch.equal(seen[0][0][:2], x[4:6])


def test_nothing_kept_is_the_identity_with_zero_gradients():
    layer, x = torch.nn.Linear(5, 5), torch.randn(6, 5, requires_grad=True)
    none = BranchDrop((torch.tensor([], dtype=torch.long),), (2.0,))
    out = add_branch(x, lambda y, *_: layer(y), ((3, 2),), none)
    out.sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones(6, 5))
    assert layer.weight.grad.abs().sum() == 0


def test_expectation_is_the_full_branch():
    x, total = torch.ones(40, 1), torch.zeros(40, 1)
    for step in range(400):
        plan = draw_drop_plan(
            seed=0, step=step, tag="t", depth=1, rate=0.5, global_sizes=[40], local_rows=[torch.arange(40)]
        )
        total += add_branch(x, lambda y, *_: y, ((40, 1),), plan.blocks[0][0]) - x
    assert abs((total / 400).mean() - 1) < 1e-5
    assert (total / 400 - 1).abs().max() < 0.25
