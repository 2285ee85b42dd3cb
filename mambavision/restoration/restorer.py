"""The model that mmengine trains and tests: a restoration network with its loss."""

from typing import Literal

from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn

from mambavision.engine.cuda_graphs import StepGraphs


@MODELS.register_module()
class Restorer(BaseModel):
    """A restoration network, its pixel loss, and the steps that mmengine calls.

    Batches are dicts of ``inputs`` (B, C, H, W) and ``gt`` (B, C, scale H, scale W) in [0, 1], not clipped, and where
    the noise level is known ``sigma`` (B,) in the same units. Networks with a noise input get sigma; in training only
    every other picture does, the rest have 0 in its place, so that the network serves where it is unknown too.

    With :class:`~mambavision.engine.cuda_graphs.CudaGraphHook`, training steps are replayed as one CUDA graph.

    Args:
        network: The network's config, of a module of (B, C, H, W) and sigma that keeps ``config``.
        loss: The loss's config.
        data_preprocessor: As in mmengine.
    """

    published_prefix = "network."
    """Before the names in a published file, which holds the network alone."""

    def __init__(self, network: dict, loss: dict, data_preprocessor: dict | nn.Module | None = None) -> None:
        super().__init__(data_preprocessor)
        self.network = MODELS.build(network)
        self.loss = MODELS.build(loss)
        self.graphs = StepGraphs(self)

    def forward(
        self,
        inputs: Tensor,
        gt: Tensor | None = None,
        sigma: Tensor | None = None,
        mode: Literal["tensor", "predict", "loss"] = "tensor",
    ) -> Tensor | list[Tensor] | dict[str, Tensor]:
        """The restored batch ("tensor"), its pictures in a list ("predict"), or the loss against gt ("loss")."""
        if sigma is not None:
            sigma = self._known(sigma, mode) if self.network.config.get("sigma_input") else None
        restored = self.network(inputs, sigma)
        if mode == "loss":
            return {"loss": self.loss(restored.float(), gt)}
        return list(restored) if mode == "predict" else restored

    @staticmethod
    def _known(sigma: Tensor, mode: str) -> Tensor:
        if mode != "loss":
            return sigma
        known = sigma.new_ones(len(sigma))
        known[1::2] = 0
        return sigma * known

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser on a batch; returns what mmengine logs."""
        data = self.data_preprocessor(data, True)
        log_vars = self.graphs(data, optim_wrapper)
        return super().train_step(data, optim_wrapper) if log_vars is None else log_vars

    def test_step(self, data: dict) -> list[Tensor]:
        """Restored pictures (C, H, W) of a batch of a test set, whose other entries only name them."""
        data = self.data_preprocessor(data, False)
        return self(data["inputs"], sigma=data.get("sigma"), mode="predict")

    val_step = test_step
