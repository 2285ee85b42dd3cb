"""Training on noisy batches, and the loss of a validation."""

from collections.abc import Mapping, Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import LOOPS, METRICS
from torch import Tensor

from mambavision.diffusion.batches import NoisyBatches
from mambavision.engine.loops import PrefetchTrainLoop


@LOOPS.register_module()
class NoisyTrainLoop(PrefetchTrainLoop):
    """Training on the batches of a :class:`~mambavision.diffusion.batches.NoisyBatches`."""

    maker = NoisyBatches


@METRICS.register_module()
class HeldOutLoss(BaseMetric):
    """Mean loss of the items of a validation: ``loss``, and by time, ``loss_0_250`` to ``loss_750_1000``.

    With :class:`~mambavision.diffusion.batches.HeldOutBatches`, items, noise and times are the same for every network
    that is trained for the same objective.
    """

    default_prefix = "held_out"
    _parts = ((0, 250), (250, 500), (500, 750), (750, 1000))

    def process(self, data_batch: Mapping[str, Tensor], data_samples: Sequence[Mapping[str, Tensor]]) -> None:
        """Keep the losses and times of a batch."""
        self.results.append(torch.stack([torch.stack([x["loss"], x["t"]]) for x in data_samples]).cpu())

    def compute_metrics(self, results: list[Tensor]) -> dict[str, float]:
        """The means; a part of the times that has no item is left out."""
        loss, t = torch.cat(results).double().unbind(1)
        parts = {f"loss_{begin}_{end}": loss[(t >= begin) & (t < end)] for begin, end in self._parts}
        return {"loss": float(loss.mean())} | {name: float(x.mean()) for name, x in parts.items() if len(x)}
