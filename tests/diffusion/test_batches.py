"""Noisy batches: functions of seed and iteration, each item once a round, the same over any number of processes."""

import numpy as np
import pytest
import torch

from mambavision.diffusion import batches
from mambavision.diffusion.batches import HeldOutBatches, NoisyBatches
from mambavision.engine.photos import DatasetError
from tests.diffusion.drawn import Drawn


class Broken(Drawn):
    """Every third item cannot be read."""

    def __getitem__(self, i):
        if i % 3 == 0:
            raise DatasetError(f"{i}.png: truncated photo")
        return super().__getitem__(i)


def numbers(inputs):
    """The items' numbers: the brightness of their middle."""
    return ((inputs[:, 0, ..., 4, 4].reshape(len(inputs), -1)[:, 0] + 1) * 127.5).round().int().tolist()


def loader(dataset=None, batch_size=4, **options):
    return NoisyBatches(dataset or Drawn(), batch_size, device="cpu", **options)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_a_round_has_each_item_once_whatever_keeps_them(keep):
    made = loader(keep=keep)
    rounds = [[made.batch(3 * k + i) for i in range(3)] for k in range(2)]
    orders = [sum((numbers(batch["inputs"]) for batch in part), []) for part in rounds]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2 and orders[0] != orders[1]
    first = rounds[0][0]
    assert first["labels"].tolist() == [number % 3 for number in numbers(first["inputs"])]
    assert first["inputs"].shape == first["noise"].shape == (4, 1, 8, 8) and first["draws"].shape == (4, 2)
    assert equal(first, loader().batch(0)) and not equal(first, loader(seed=1).batch(0))


def test_batches_larger_than_the_set_go_round():
    made = loader(Drawn(5), 12)
    counts = np.bincount(sum((numbers(made.batch(i)["inputs"]) for i in range(5)), []))  # 60 items, 12 rounds
    assert counts.tolist() == [12] * 5


def test_processes_share_a_batch():
    whole = loader(flip := Drawn(flip=True)).batch(5)
    parts = [loader(flip, rank=rank, world_size=2).batch(5) for rank in (0, 1)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        loader(rank=0, world_size=3)


def test_processes_take_the_clips_that_one_would():
    videos = Drawn(size=(3, 8, 8), frames=9)
    whole = loader(videos).batch(5)["inputs"]
    assert len(set(whole[:, 0, 0, 0, -1].tolist())) > 1  # they start at different frames
    assert torch.equal(
        torch.cat([loader(videos, rank=rank, world_size=2).batch(5)["inputs"] for rank in (0, 1)]), whole
    )


def test_half_of_the_items_are_mirrored():
    made = loader(Drawn(flip=True), 400)
    inputs = made.batch(0)["inputs"]
    left, right = inputs[:, 0, 4, 0] > 0.5, inputs[:, 0, 4, -1] > 0.5
    assert (left ^ right).all() and 150 < int(left.sum()) < 250
    assert (loader(Drawn(), 400).batch(0)["inputs"][:, 0, 4, 0] > 0.5).all()


@pytest.mark.parametrize("keep", ["device", "disk"])
def test_clips_are_windows_of_videos(keep):
    dataset = Drawn(size=(3, 8, 8), frames=5)
    seen = set()
    made = loader(dataset, 12, keep=keep)
    for i in range(6):
        inputs = made.batch(i)["inputs"]
        assert inputs.shape == (12, 1, 3, 8, 8)
        frames = ((inputs[:, 0, :, 0, -1] + 1) * 127.5).round().int()
        assert torch.equal(frames - frames[:, :1], torch.arange(3).expand(12, 3))
        seen |= set(frames[:, 0].tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("keep", ["device", "host", "disk"])
def test_items_that_cannot_be_read_are_counted_and_left_out(keep):
    made = loader(Broken(), keep=keep)
    found = set(sum((numbers(made.batch(i)["inputs"]) for i in range(6)), []))
    assert found == {i for i in range(12) if i % 3}
    assert sorted(made.skipped) == sorted(f"{i}.png: truncated photo" for i in (0, 3, 6, 9))


@pytest.mark.parametrize("keep", ["device", "disk"])
def test_a_set_without_readable_items_is_refused(keep):
    with pytest.raises(DatasetError, match="none of 1"):
        loader(Broken(1), keep=keep).batch(0)


def test_too_little_memory_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="12 items need 0.0 GB on cpu, 0.0 GB are free: set .*keep='host' or 'disk'"):
        loader()
    with pytest.raises(MemoryError, match="9 items need .* are free: hold out fewer"):
        HeldOutBatches(Drawn(), 4, num=9, device="cpu")
    loader(keep="disk").batch(0)
    with pytest.raises(MemoryError, match="hold out fewer"):
        HeldOutBatches(Drawn(), 4, device="cpu")


def test_memory_is_judged_by_several_videos(monkeypatch):
    class Uneven(Drawn):
        """The first video is 100 times as long as the others."""

        def __getitem__(self, i):
            item = super().__getitem__(i)
            return item if i else item._replace(frames=item.frames.repeat(100, 0))

    one = 4 * 8 * 8  # bytes of a short video
    monkeypatch.setattr(batches, "free_memory", lambda device: 2 * 12 * 25 * one)
    clips = dict(num=12, size=(4, 8, 8), frames=4)
    assert loader(Uneven(**clips)).batch(0)["inputs"].shape == (4, 1, 4, 8, 8)
    monkeypatch.setattr(batches, "free_memory", lambda device: 2 * 12 * 15 * one)
    with pytest.raises(MemoryError):
        loader(Uneven(**clips))


def test_held_out_items_alone_are_read():
    found = HeldOutBatches(Broken(12), 4, num=8, device="cpu")  # 0, 1, 3, 4, 6, 7, 9, 10
    assert sum((numbers(batch["inputs"]) for batch in found), []) == [1, 4, 7, 10]
    assert found.skipped == [f"{i}.png: truncated photo" for i in (0, 3, 6, 9)] and len(found) == 1


@pytest.mark.parametrize(
    ("batch_size", "num", "message"),
    [(0, None, "batch_size=0 must be at least 1"), (4, 0, "num=0 must be at least 1"), (4, -1, "num=-1 must be")],
)
def test_held_out_batches_have_items(batch_size, num, message):
    with pytest.raises(ValueError, match=message):
        HeldOutBatches(Drawn(), batch_size, num=num, device="cpu")


def test_iteration_can_be_set():
    made = loader()
    made.iteration = 7
    assert equal(next(iter(made)), loader().batch(7)) and made.iteration == 8


def test_held_out_batches_are_always_the_same_and_cover_all_times():
    one, other = (HeldOutBatches(Drawn(40, flip=True), 8, num=20, device="cpu") for _ in range(2))
    assert len(one) == 3 and all(equal(one[i], other[i]) for i in range(3))
    draws = torch.cat([one[i]["draws"] for i in range(3)])
    assert (draws[:, 0] * 20).floor().sort().values.tolist() == list(range(20)) and (draws[:, 1] == 1).all()
    inputs = torch.cat([one[i]["inputs"] for i in range(3)])
    assert numbers(inputs) == list(range(0, 40, 2)) and (inputs[:, 0, 4, 0] > 0.5).all()
    with pytest.raises(IndexError):
        one[3]
    assert not torch.equal(one[0]["noise"], one[1]["noise"])


@pytest.mark.gpu
def test_batches_lie_on_the_gpu():
    for keep in ("device", "host", "disk"):
        made = NoisyBatches(Drawn(), 4, keep=keep, device="cuda")
        batch = made.batch(0)
        assert all(value.is_cuda for value in batch.values())
        assert numbers(batch["inputs"].cpu()) == numbers(loader().batch(0)["inputs"])
    held_out = HeldOutBatches(Drawn(), 4, device="cuda")[0]
    expected = HeldOutBatches(Drawn(), 4, device="cpu")[0]
    for name in expected:  # a GPU divides by 127.5 with another last bit
        torch.testing.assert_close(held_out[name].cpu(), expected[name], rtol=0, atol=2e-7 * (name == "inputs"))
