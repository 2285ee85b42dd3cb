"""Networks as files that run elsewhere: ONNX of standard operators, or a program of torch.export with our operators."""

import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mambavision.engine.files import atomic_path, check_folder
from mambavision.ops.dispatch import portable_scans

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4
"""Largest difference to the network that a file may have, in units of the largest value of an output, at least 1."""
Run = Callable[..., Any]
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exportable:
    """A network, and what its file says of itself.

    Attributes:
        network: Takes pictures (B, channels, H, W), and where it has two inputs numbers (B,).
        channels: Of the pictures.
        inputs, outputs: Names.
        multiple: H and W are multiples of it where they are left open.
        metadata: Written into ONNX files, JSON where it is no text.
    """

    network: nn.Module
    channels: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    multiple: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Random pictures, and numbers where they are an input, in [0, 1]."""
        generator = torch.Generator().manual_seed(0)
        pictures = torch.rand(batch, self.channels, height, width, generator=generator)
        return (pictures, torch.rand(batch, generator=generator))[: len(self.inputs)]


@dataclass(frozen=True)
class Comparison:
    """A written file beside its network, on pictures of random values.

    Attributes:
        difference: The largest one of outputs, over the output's largest value, or 1 where that is smaller.
        shape: (B, H, W) of the pictures that the times are of; sizes that were not traced, where they are left open.
        seconds, network_seconds: A second run of each took, on as many threads.
    """

    difference: float
    shape: tuple[int, int, int]
    seconds: float
    network_seconds: float


def check_target(path: str | Path) -> None:
    """Check before any work that a file can be written.

    Raises:
        ValueError: If its suffix is unknown, or what ONNX needs is not installed.
        NotADirectoryError, FileNotFoundError: If its folder is none.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: exported files end in {' or '.join(SUFFIXES)}; name such a file")
    check_folder(path.parent, "OUT")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(f'ONNX needs {", ".join(missing)}: pip install -e ".[export]"')


def export(
    what: Exportable, path: str | Path, *, size: tuple[int, int] | None = None, batch: int | None = None
) -> Comparison:
    """Write a network to a file, run it, and compare: whole and right, or not at all.

    Args:
        what: The network, on the CPU, in eval mode.
        path: ``*.onnx``, or ``*.pt2`` for torch.export.load where ``mambavision.ops`` is imported.
        size: (H, W) of the pictures; None leaves them open.
        batch: Pictures at a time; None leaves it open.

    Raises:
        ValueError: If the network cannot be exported, or the file gives other values than :data:`TOLERANCE` allows.
    """
    check_target(path)
    for name, sides in (("size", size or ()), ("batch", (1 if batch is None else batch,))):
        if min(sides, default=1) < 1:
            raise ValueError(f"{name} must be at least 1, got {' '.join(map(str, sides))}")
    axes = _open_axes(what, size, batch)
    program = _trace(what, axes, size, batch)
    with atomic_path(path) as temporary:
        if Path(path).suffix == ".onnx":
            _write_onnx(what, program, axes, temporary)
            run = _onnx_runner(temporary)
        else:
            torch.export.save(program, temporary)
            run = torch.export.load(temporary).module()
        return _compare(what, run, size, batch)


def _open_axes(what: Exportable, size: tuple[int, int] | None, batch: int | None) -> tuple[dict[int, Any], ...]:
    """Of every input, axes whose size is left open, and their names."""
    free: dict[int, Any] = {} if batch else {0: Dim("batch")}
    numbers = dict(free)
    if size is None:
        free |= {axis: Dim(name, min=2) * what.multiple for axis, name in ((2, "rows"), (3, "columns"))}
    return (free, numbers)[: len(what.inputs)]


def _trace(
    what: Exportable, axes: tuple[dict[int, Any], ...], size: tuple[int, int] | None, batch: int | None
) -> ExportedProgram:
    height, width = size or (6 * what.multiple, 7 * what.multiple)
    arguments = what.arguments(batch or 2, height, width)  # a batch of 1 would be taken for the only one
    what.network.requires_grad_(False)
    what.network(*arguments)  # says what it does not take
    try:
        with portable_scans(), torch.no_grad(), _quiet():
            return torch.export.export(what.network, arguments, dynamic_shapes=axes)
    except Exception as error:  # Dynamo's and the tracer's are of many kinds
        advice = "" if size else "; a fixed --size may do"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"torch {torch.__version__} cannot trace this network ({reason}){advice}") from error


def _write_onnx(what: Exportable, program: ExportedProgram, axes: tuple[dict[int, Any], ...], path: Path) -> None:
    from mambavision.engine.onnx_ops import TRANSLATIONS

    try:
        with _quiet():
            onnx = torch.onnx.export(
                program, dynamo=True, custom_translation_table=TRANSLATIONS, verbose=False,
                input_names=what.inputs, output_names=what.outputs, dynamic_shapes=axes,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()[0]
        raise ValueError(f"torch {torch.__version__} cannot write this network as ONNX: {reason}") from error
    for node in onnx.model.graph.all_nodes():
        node.metadata_props.clear()  # lines of our sources
    for name, value in what.metadata.items():
        onnx.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    onnx.save(path, external_data=False)


def _onnx_runner(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*arguments: Tensor) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


def _compare(what: Exportable, run: Run, size: tuple[int, int] | None, batch: int | None) -> Comparison:
    m, worst = what.multiple, 0.0
    for height, width in [size] if size else [(5 * m, 9 * m), (8 * m, 8 * m)]:
        arguments = what.arguments(batch or 1, height, width)
        (found, seconds), (wanted, network_seconds) = _timed(run, arguments), _timed(what.network, arguments)
        for name, y, expected in zip(what.outputs, found, wanted, strict=True):
            difference = ((y - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"the file's {name} of {height}x{width} pixels differ by {difference:.1e} of the largest value, "
                    f"{TOLERANCE:.0e} is allowed: not written"
                )
            worst = max(worst, difference)
    return Comparison(worst, (batch or 1, height, width), seconds, network_seconds)


@torch.no_grad()
def _timed(run: Run, arguments: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    values = run(*arguments)
    started = time.perf_counter()
    run(*arguments)
    seconds = time.perf_counter() - started
    return [values] if isinstance(values, Tensor) else list(values), seconds


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
