"""Memory for pictures: who may write to it, and when."""

import multiprocessing

import pytest
import torch

from megavtp.data.picture_memory import PictureMemory, at_places


def test_a_worker_has_slots_of_its_own():
    memory = PictureMemory(workers=2, slots=2, size=10)
    taken = [memory.take(worker, 10) for worker in (0, 0, 1, 1)]
    for number, piece in enumerate(taken):
        piece.fill_(number)
    assert [set(piece.tolist()) for piece in taken] == [{0}, {1}, {2}, {3}]
    assert memory.take(0, 1) is None and memory.take(1, 1) is None


def test_nothing_larger_than_a_slot_is_given():
    memory = PictureMemory(1, 1, 10)
    assert memory.take(0, memory.size + 1) is None
    assert memory.take(0, memory.size).numel() == memory.size >= 10


def test_tensors_are_found_again_by_their_places():
    memory, other = PictureMemory(1, 2, 24), PictureMemory(1, 1, 24)
    memory.take(0, 1)
    first, second = memory.take(0, 24).copy_(torch.arange(24)).split([4, 20])
    places = {"a": memory.place(first.view(2, 2)), "b": memory.place(second.view(5, 4))}
    assert other.place(first) is None and memory.place(torch.zeros(3)) is None
    found = at_places(places)
    assert torch.equal(found["a"], first.view(2, 2)) and torch.equal(found["b"], second.view(5, 4))
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_a_slot_is_free_once_nothing_of_it_is_held():
    memory = PictureMemory(1, 1, 24)
    place = memory.place(memory.take(0, 24).view(4, 6))
    held = at_places({"pictures": place})["pictures"]
    assert memory.take(0, 24) is None
    held = held[2:, 3]  # a view holds it, too
    assert memory.take(0, 24) is None
    del held
    assert memory.take(0, 24) is not None


def test_what_is_no_row_of_bytes_has_no_place():
    memory = PictureMemory(1, 1, 24)
    whole = memory.take(0, 24)
    assert memory.place(whole.view(4, 6).t()) is None and memory.place(whole[::2]) is None
    assert memory.place(whole.view(torch.float32)) is None


@pytest.mark.timeout(60)
def test_a_forked_process_that_lets_go_of_its_copy_frees_nothing():
    memory = PictureMemory(1, 1, 24)
    held = [at_places({"pictures": memory.place(memory.take(0, 24))})]
    child = multiprocessing.get_context("fork").Process(target=held.clear)
    child.start()
    child.join()
    assert child.exitcode == 0 and memory.take(0, 24) is None
    held.clear()
    assert memory.take(0, 24) is not None
