"""What torch.compile needs to know: operators it must not look into, functions whose result is constant."""

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)
_library = torch.library.Library("mambavision", "FRAGMENT")
_hidden = functools.cache(torch.compiler.disable)  # imports Dynamo when it is called


def constant_result(function: F) -> F:
    """Let torch.compile call the function while tracing and keep its result.

    The mark that ``torch.compiler.assume_constant_result`` sets, without its import of Dynamo and triton.
    """
    function._dynamo_marked_constant = True
    return function


def register(
    function: Callable,
    name: str,
    *,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Make a function of tensors the operator ``torch.ops.mambavision.<name>``.

    As ``torch.library.custom_op``, but for its import of Dynamo at the first call, which takes longer than to compile
    the kernels.

    Args:
        function: annotated, it changes none of its arguments and returns none of them.
        fake: of the same arguments; returns empty tensors of the right shapes, types and strides.
        backward, setup_context: as in ``torch.library.register_autograd``; without them gradients raise RuntimeError.
    """
    name = f"mambavision::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    _library.define(name.partition("::")[2] + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernel(*arguments):
        return (_hidden(function) if "torch._dynamo" in sys.modules else function)(*arguments)

    def twice(ctx, *_):
        raise RuntimeError(f"{name} has no gradient of its own: what it serves can be differentiated once, not twice")

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, backward or twice, setup_context=setup_context, lib=_library)
