"""Sampling of data sets that are too long to be finished."""

from collections.abc import Iterator, Sized

from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler


@DATA_SAMPLERS.register_module()
class ConsecutiveSampler(Sampler[int]):
    """Indices in order, cut into short epochs: epoch e visits start + e * epoch_length and those that follow.

    Beyond the last index it begins anew. Made for composed data sets, whose length is free: no sample comes twice, and
    a resumed run goes on with the samples after its checkpoint's, without loading the ones before as mmengine's
    IterBasedTrainLoop does. mmengine's DistSamplerSeedHook sets the epoch; of W processes each takes every W-th index.

    Args:
        dataset: the data set.
        epoch_length: samples an epoch, over all processes.
        start: index of the first sample of epoch 0, for a run that goes on from weights without a checkpoint.
        seed: not used, the order is fixed; mmengine passes one.

    Raises:
        ValueError: if ``epoch_length`` is less than the number of processes.
    """

    def __init__(self, dataset: Sized, *, epoch_length: int, start: int = 0, seed: int | None = None) -> None:
        self.rank, self.world_size = get_dist_info()
        if epoch_length < self.world_size:
            raise ValueError(f"epoch_length={epoch_length} must be at least {self.world_size}, one sample a process")
        self.dataset, self.epoch_length, self.start, self.epoch = dataset, epoch_length, start, 0

    def __iter__(self) -> Iterator[int]:
        first = self.start + self.epoch * self.epoch_length + self.rank
        indices = range(first, first + len(self) * self.world_size, self.world_size)
        return (index % len(self.dataset) for index in indices)

    def __len__(self) -> int:
        return self.epoch_length // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration visits."""
        self.epoch = epoch
