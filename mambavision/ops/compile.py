"""What torch.compile needs to know."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_result(function: F) -> F:
    """Let torch.compile call the function while tracing and keep its result.

    The mark that ``torch.compiler.assume_constant_result`` sets, without its import of Dynamo and triton.
    """
    function._dynamo_marked_constant = True
    return function
