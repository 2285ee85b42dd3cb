"""Training on endless batches that are functions of their iteration."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import torch
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class BatchMaker(IterableDataset):
    """Endless batches, each a function of seed and iteration; what :class:`PrefetchTrainLoop` trains on.

    Attributes:
        seed: Of all that is drawn.
        device: Where batches lie.
        iteration: The one whose batch comes next; may be set.
    """

    seed: int
    device: torch.device
    iteration: int

    def batch(self, iteration: int) -> dict[str, Tensor]:
        """The batch of an iteration: this process's slice of it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.iteration += 1
            yield self.batch(self.iteration - 1)


def moved(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, by a copy that does not wait for it."""
    values = torch.as_tensor(values)
    if device.type == "cuda":
        values = values.pin_memory()  # from other memory, a copy waits for the GPU
    return values.to(device, non_blocking=True)


class _Batches(DataLoader):
    """Made batches with the attributes that mmengine reads of a loader."""

    def __init__(self, maker: BatchMaker, length: int) -> None:
        super().__init__(maker, batch_size=None)
        self._length = length

    def __len__(self) -> int:
        return self._length


class PrefetchTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop on made batches, each made while the one before is trained on.

    A resumed run goes on with the batch after its checkpoint's: none before it is made again. First comes the
    validation of the checkpoint's iteration, if one was due: it may have been interrupted. A task names what makes its
    batches in a subclass.

    Args:
        runner: The runner.
        dataloader: Arguments of what makes the batches, without ``seed``.
        max_iters: Iterations in all.
        val_begin: First iteration that may be validated.
        val_interval: Iterations between two validations.
    """

    maker: ClassVar[type[BatchMaker]]

    def __init__(
        self, runner: Runner, dataloader: dict, max_iters: int, val_begin: int = 1, val_interval: int = 1000
    ) -> None:
        self.batches = self.maker(**dataloader, seed=runner.seed)
        super().__init__(runner, _Batches(self.batches, max_iters), max_iters, val_begin, val_interval)

    def run(self) -> torch.nn.Module:
        """Launch training."""
        runner = self.runner
        self.batches.seed = runner.seed  # a resumed run has its checkpoint's
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        runner.model.train()
        if self._iter:
            self._validate_if_due()
        for batch in self._coming():
            self.run_iter(batch)
            self._validate_if_due()
            if self._is_last:
                break
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    @property
    def _is_last(self) -> bool:
        return self._iter >= self._max_iters or self.stop_training

    def _validate_if_due(self) -> None:
        due = self._iter >= self.val_begin and (self._iter % self.val_interval == 0 or self._is_last)
        if self.runner.val_loop is not None and due:
            self.runner.val_loop.run()
            self.runner.model.train()

    def _coming(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the present iteration on, made by another thread on a stream of its own."""
        stream = torch.cuda.Stream() if self.batches.device.type == "cuda" else None

        def make(iteration: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
            with torch.cuda.stream(stream):
                batch = self.batches.batch(iteration)
                return batch, stream and stream.record_event()

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(make, self._iter)
            for iteration in range(self._iter, self._max_iters):
                batch, made = coming.result()
                if iteration + 1 < self._max_iters:
                    coming = pool.submit(make, iteration + 1)
                if made:
                    torch.cuda.current_stream().wait_event(made)
                    for value in batch.values():
                        value.record_stream(torch.cuda.current_stream())
                yield batch
