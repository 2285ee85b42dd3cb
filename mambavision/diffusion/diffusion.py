"""The model that mmengine trains and validates: a denoising network with its objective."""

from typing import Literal

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from torch import Tensor, nn

from mambavision.diffusion.objectives import objective_from
from mambavision.engine.cuda_graphs import StepGraphs


@MODELS.register_module()
class Diffusion(BaseModel):
    """A denoising network, its objective, and the steps that mmengine calls.

    Batches are those of :class:`~mambavision.diffusion.batches.NoisyBatches`: all that is random is in them. With
    :class:`~mambavision.engine.cuda_graphs.CudaGraphHook`, training steps are replayed as one CUDA graph.

    Args:
        network: The network's config, of a module of (x_t, t, labels) that keeps ``config`` and ``num_classes``.
        objective: The objective's config, as of ``Objective.config()``.
        class_dropout: How often a picture's class is left out in training, so that sampling can be guided by the
            difference that the class makes (Ho and Salimans, "Classifier-free diffusion guidance", 2022).
        compile: Compile each of the network's ``blocks``, for training on a GPU.
        data_preprocessor: As in mmengine.

    Raises:
        ValueError: If the objective is unknown, ``class_dropout`` is not in [0, 1], or there are no blocks to compile.
    """

    published_prefix = "network."
    """Before the names in a published file, which holds the network alone."""

    def __init__(
        self,
        network: dict,
        objective: dict,
        class_dropout: float = 0.1,
        compile: bool = False,
        data_preprocessor: dict | nn.Module | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout={class_dropout} must be in [0, 1]")
        self.network = MODELS.build(network)
        self.objective = objective_from(objective)
        self.class_dropout = class_dropout
        if compile and not hasattr(self.network, "blocks"):
            raise ValueError(f"compile: a {type(self.network).__name__} has no blocks to compile, leave it out")
        if compile and torch.cuda.is_available():  # on a CPU it would need a C++ compiler
            for block in self.network.blocks:
                block.compile()
        self.graphs = StepGraphs(self)

    def forward(
        self,
        inputs: Tensor,
        noise: Tensor,
        draws: Tensor,
        labels: Tensor | None = None,
        *,
        mode: Literal["loss", "predict"] = "loss",
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The mean loss of a batch ("loss"), or ``loss`` and ``t`` of each item with its class ("predict").

        Args:
            inputs: x_0 (B, C, H, W) or (B, C, T, H, W).
            noise: Standard normal, like inputs.
            draws: Uniform in [0, 1), (B, 2): for time and class dropout.
            labels: Classes (B,).
            mode: What to return.
        """
        if not self.network.num_classes:
            labels = None
        elif mode == "loss" and self.class_dropout:
            labels = torch.where(draws[:, 1] < self.class_dropout, self.network.num_classes, labels)
        t = self.objective.times(draws[:, 0])
        losses = self.objective.loss(self.network, inputs, labels, noise, t)
        if mode == "loss":
            return {"loss": losses.mean()}
        return [{"loss": loss, "t": time} for loss, time in zip(losses, t, strict=True)]

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser on a batch; returns what mmengine logs."""
        data = self.data_preprocessor(data, True)
        log_vars = self.graphs(data, optim_wrapper)
        return super().train_step(data, optim_wrapper) if log_vars is None else log_vars

    def val_step(self, data: dict) -> list[dict[str, Tensor]]:
        """``loss`` and ``t`` of each item of a validation's batch; not compiled, as it comes in other shapes."""
        with torch.compiler.set_stance("force_eager"):
            return super().val_step(data)

    test_step = val_step
