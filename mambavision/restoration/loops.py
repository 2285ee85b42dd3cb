"""Training on endless crops."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader

from mambavision.restoration.batches import CropLoader


class _CropBatches(DataLoader):
    """A CropLoader with the attributes that mmengine reads of a loader."""

    def __init__(self, crops: CropLoader, length: int) -> None:
        super().__init__(crops, batch_size=None)
        self._length = length

    def __len__(self) -> int:
        return self._length


@LOOPS.register_module()
class CropTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop on the batches of a CropLoader, each made while the one before is trained on.

    A resumed run goes on with the batch after its checkpoint's: none before it is made again.

    Args:
        runner: The runner.
        dataloader: Arguments of :class:`~mambavision.restoration.batches.CropLoader`, without ``seed``.
        max_iters: Iterations in all.
        val_begin: First iteration that may be validated.
        val_interval: Iterations between two validations.
    """

    def __init__(
        self, runner: Runner, dataloader: dict, max_iters: int, val_begin: int = 1, val_interval: int = 1000
    ) -> None:
        self.crops = CropLoader(**dataloader, seed=runner.seed)
        super().__init__(runner, _CropBatches(self.crops, max_iters), max_iters, val_begin, val_interval)

    def run(self) -> torch.nn.Module:
        """Launch training."""
        runner = self.runner
        self.crops.seed = runner.seed  # a resumed run has its checkpoint's
        runner.call_hook("before_train")
        runner.call_hook("before_train_epoch")
        runner.model.train()
        for batch in self._batches():
            self.run_iter(batch)
            last = self._iter >= self._max_iters or self.stop_training
            due = self._iter >= self.val_begin and (self._iter % self.val_interval == 0 or last)
            if runner.val_loop is not None and due:
                runner.val_loop.run()
                runner.model.train()
            if last:
                break
        runner.call_hook("after_train_epoch")
        runner.call_hook("after_train")
        return runner.model

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the present iteration on, made by another thread on a stream of its own."""
        stream = torch.cuda.Stream() if self.crops.device.type == "cuda" else None

        def make(iteration: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
            with torch.cuda.stream(stream):
                batch = self.crops.batch(iteration)
                return batch, stream and stream.record_event()

        with ThreadPoolExecutor(1) as maker:
            coming = maker.submit(make, self._iter)
            for iteration in range(self._iter, self._max_iters):
                batch, made = coming.result()
                if iteration + 1 < self._max_iters:
                    coming = maker.submit(make, iteration + 1)
                if made:
                    torch.cuda.current_stream().wait_event(made)
                    for value in batch.values():
                        value.record_stream(torch.cuda.current_stream())
                yield batch
