import pytest
from mmdet.registry import DATA_SAMPLERS

import mambavision.detection  # noqa: F401 (registers the sampler)
from mambavision.detection import samplers


def epochs(length, epoch_length, numbers, **options):
    sampler = DATA_SAMPLERS.build(
        dict(type="ConsecutiveSampler", epoch_length=epoch_length, **options),
        default_args=dict(dataset=range(length), seed=3),
    )
    for epoch in numbers:
        sampler.set_epoch(epoch)
        yield list(sampler)
        assert len(sampler) == len(list(sampler))


def test_epochs_follow_each_other_and_wrap_around():
    assert list(epochs(10, 4, range(4))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]
    assert list(epochs(10**8, 3, [10**6])) == [[3 * 10**6, 3 * 10**6 + 1, 3 * 10**6 + 2]]


def test_a_run_can_go_on_where_another_ended():
    assert list(epochs(10, 4, range(2), start=7)) == [[7, 8, 9, 0], [1, 2, 3, 4]]


def test_processes_share_an_epoch(monkeypatch):
    seen = []
    for rank in range(2):
        monkeypatch.setattr(samplers, "get_dist_info", lambda rank=rank: (rank, 2))
        (indices,) = epochs(100, 6, [1])
        seen.append(indices)
    assert seen == [[6, 8, 10], [7, 9, 11]]
    with pytest.raises(ValueError, match="epoch_length=1 "):
        list(epochs(100, 1, [0]))
