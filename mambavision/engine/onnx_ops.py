"""The project's operators in standard ONNX operators: the ``custom_translation_table`` of torch.onnx.export.

B batch, L tokens, K scans, D channels, N states. L is cut into S chunks of Q steps, which advance together: M = B S.
"""

import numpy as np
import onnx
import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from mambavision.ops.orders import ORDERS, order_table

_domain = Opset("mambavision", 1)
WORTHWHILE = 4096  # numbers of a state; a step over fewer is mostly onnxruntime's overhead, so chunks share one


@script(_domain)
def advance(A, h, dt, w, b) -> FLOAT:
    """The state after Q steps from h (M, K, N, D): A (K, N, D), dt and w = dt u (Q, M, K, 1, D), b (Q, M, K, N, 1)."""

    @graph()
    def step(h_q, dt_q, w_q, b_q):
        h_next = op.Add(op.Mul(op.Exp(op.Mul(A, dt_q)), h_q), op.Mul(b_q, w_q))
        return h_next

    return op.Scan(h, dt, w, b, body=step, num_scan_inputs=3)


@script(_domain)
def advance_and_read(A, h, dt, w, b, c) -> tuple[FLOAT, FLOAT]:
    """The same, and y (Q, M, K, 1, D) of all steps; c (Q, M, K, 1, N)."""

    @graph()
    def step(h_q, dt_q, w_q, b_q, c_q):
        h_next = op.Add(op.Mul(op.Exp(op.Mul(A, dt_q)), h_q), op.Mul(b_q, w_q))
        y_q = op.MatMul(c_q, h_next)
        return h_next, y_q

    h_last, y_all = op.Scan(h, dt, w, b, c, body=step, num_scan_inputs=4)
    return h_last, y_all


@script(_domain)
def chain(h, total, end) -> FLOAT:
    """States (S, B, K, N, D) from which chunks start: the first from h, each other where the one before it ends."""

    @graph()
    def step(h_s, total_s, end_s):
        h_next = op.Add(op.Mul(total_s, h_s), end_s)
        start = op.Identity(h_s)
        return h_next, start

    h_last, starts = op.Scan(h, total, end, body=step, num_scan_inputs=2)
    return starts


def scan(x, delta, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge, z, keep, backend):
    """``mambavision::scan``; arguments and results are those of :func:`mambavision.kernels.reference.scan`."""
    K, channels, N = A.shape
    S = max(1, WORTHWHILE // (K * channels * N))
    batch, length = op.Shape(delta, end=1), op.Shape(delta, start=1, end=2)
    Q = op.Div(op.Add(length, [S - 1]), [S])

    def shape(*sizes):
        return op.Concat(*(op.Constant(value_ints=[v]) if isinstance(v, int) else v for v in sizes), axis=0)

    def rows(index):
        """(L, K): where a token of scan k is among the L K tokens of all scans; index (K, L)."""
        return op.Transpose(op.Add(op.Mul(index, [K]), op.Constant(value=_tensor(np.arange(K)[:, None]))), perm=[1, 0])

    def pick(v, n, index):
        """Tokens of v (B, L, K, n) by index (K, L)."""
        return op.Gather(op.Reshape(v, shape(0, -1, n)), rows(index), axis=1)

    def cut(v, *last):
        """(B, L, K, n) in scan order as (Q, S B, K, *last); what is added at the end is 0."""
        v = v if S == 1 else op.Pad(v, shape(0, 0, 0, 0, 0, op.Sub(op.Mul(Q, [S]), length), 0, 0))
        v = op.Transpose(op.Reshape(v, shape(batch, S, Q, -1)), perm=[2, 1, 0, 3])
        return op.Reshape(v, shape(Q, op.Mul(batch, [S]), K, *last))

    dt = delta if delta_bias is None else op.Add(delta, delta_bias)
    dt = op.Softplus(dt) if delta_softplus else dt
    A = op.Transpose(A, perm=[0, 2, 1])
    tokens = (dt, op.Mul(dt, x), B, C)
    if order is not None:
        order = op.Cast(order, to=onnx.TensorProto.INT64)
        steps = op.Expand(op.Range(0, op.Squeeze(length), 1), op.Shape(order))
        inverse = op.ScatterElements(steps, order, steps, axis=1)
        tokens = (pick(v, n, order) for v, n in zip(tokens, (channels, channels, N, N), strict=True))
    dt, w, b, c = (cut(v, *last) for v, last in zip(tokens, ((1, -1), (1, -1), (-1, 1), (1, -1)), strict=True))

    if initial_state is None:
        h = op.Expand(0.0, shape(batch, K, N, channels))
    else:
        h = op.Transpose(initial_state, perm=[0, 1, 3, 2])
    if S > 1:
        parts = shape(S, batch, K, N, channels)
        end = advance(A, op.Expand(0.0, shape(op.Mul(batch, [S]), K, N, channels)), dt, w, b)
        total = op.Exp(op.Mul(A, op.ReduceSum(dt, [0], keepdims=0)))
        starts = chain(h, op.Reshape(total, parts), op.Reshape(end, parts))
        h = op.Reshape(starts, shape(op.Mul(batch, [S]), K, N, channels))
    last, y = advance_and_read(A, h, dt, w, b, c)

    y = op.Transpose(op.Reshape(y, shape(Q, S, batch, -1)), perm=[2, 1, 0, 3])
    y = op.Reshape(y, shape(batch, -1, K, channels))
    y = op.Slice(y, [0], length, [1]) if order is None else pick(y, channels, inverse)
    y = y if D is None else op.Add(y, op.Mul(x, D))
    y = op.ReduceSum(y, [2], keepdims=0) if merge else y
    last = op.Gather(op.Reshape(last, shape(S, batch, K, N, channels)), S - 1, axis=0)
    return y, op.Transpose(last, perm=[0, 1, 3, 2]), op.Constant(value=_tensor(np.zeros(0, np.float32)))


def table(orders, grid, device):
    """``mambavision::order_table``: (K, L), of a grid of any size for orders along rows and columns."""
    names = [ORDERS[order] for order in orders]
    if all(isinstance(size, int) for size in grid):
        return op.Constant(value=_tensor(order_table(names, tuple(grid)).index.numpy()))
    unknown = [name for name in names if name.removesuffix("_reverse") not in ("row", "col")]
    if unknown or len(grid) != 2:
        raise ValueError(f"scan order {(unknown or names)[0]!r} is exported for pictures of one size alone")
    height, width = (op.Reshape(size, [1]) for size in grid)
    length = op.Squeeze(op.Mul(height, width))
    image = op.Reshape(op.Range(0, length, 1), op.Concat(height, width, axis=0))
    scans = []
    for name in names:
        visited = op.Reshape(op.Transpose(image, perm=[1, 0]) if name.startswith("col") else image, [1, -1])
        scans.append(op.Sub(op.Sub(length, 1), visited) if name.endswith("_reverse") else visited)
    return op.Cast(op.Concat(*scans, axis=0), to=onnx.TensorProto.INT32)


def _tensor(array):
    return onnx.numpy_helper.from_array(np.ascontiguousarray(array))


TRANSLATIONS = {torch.ops.mambavision.scan.default: scan, torch.ops.mambavision.order_table.default: table}
