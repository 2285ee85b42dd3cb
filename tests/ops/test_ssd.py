"""The public ssd: its equation, its refusals, registration with torch, and the non-causal form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.kernels import cuda, ssd_cuda
from mambavision.ops import dispatch, noncausal_ssd, ssd, use_backend


def arguments(length=12, *, directions=1, dtype=torch.float64, options=True, requires_grad=True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    batch, H, P, G, N = 2, 4, 3, 2, 5

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "x": normal(batch, length, H, P),
        "dt": normal(batch, length, H),
        "A": -torch.rand(H, generator=g, dtype=torch.float64) - 0.1,
        "B": normal(batch, length, G, N),
        "C": normal(batch, length, G, N),
    }
    if options:
        state = (batch, H, P, N) if directions == 1 else (batch, 2, H, P, N)
        args |= {
            "D": normal(H),
            "z": normal(batch, length, H, P),
            "dt_bias": normal(H),
            "initial_state": normal(*state),
        }
    return {k: v.to(dtype).requires_grad_(requires_grad) for k, v in args.items()}


def matrix(x, dt, A, B, C, *, form) -> Tensor:
    """y by the L x L matrix, written from the docstring's sums."""
    L, H = dt.shape[1:]
    B, C = (v.repeat_interleave(H // v.shape[2], 2) for v in (B, C))
    w = torch.einsum("bihn,bjhn->bhij", C, B) * dt.transpose(1, 2)[:, :, None]
    M = torch.zeros_like(w)
    for i in range(L):
        for j in range(L):
            if j < i:
                M[:, :, i, j] = torch.exp((dt * A)[:, j + 1 : i + 1].sum(1))
            elif j > i and form != "causal":
                M[:, :, i, j] = torch.exp((dt * A)[:, i:j].sum(1))
            elif i == j:
                M[:, :, i, j] = {"causal": 1, "sum": 2, "free": 0}[form]
    return torch.einsum("bhij,bjhp->bihp", w * M, x)


FORMS = {
    "causal": {},
    "sum": {"bidirectional": True},
    "free": {"bidirectional": True, "diagonal": "free"},
}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_of_the_docstring(form, backend):
    args = arguments(9, options=False, requires_grad=False)
    y = ssd(**args, **FORMS[form], chunk_size=4, backend=backend)
    torch.testing.assert_close(y, matrix(**args, form=form))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_sum_form_is_the_scan_and_the_scan_of_the_reversed_sequence(backend):
    args = arguments(13, directions=2, requires_grad=False)
    z, D, state = args.pop("z"), args.pop("D"), args.pop("initial_state")
    options = {"dt_softplus": True, "return_last_state": True, "chunk_size": 4, "backend": backend}
    y, last = ssd(**args, D=D, z=z, initial_state=state, bidirectional=True, **options)
    forward, end = ssd(**args, initial_state=state[:, 0], **options)
    flipped = {k: v.flip(1) if v.dim() > 1 else v for k, v in args.items()}
    backward, start = ssd(**flipped, initial_state=state[:, 1], **options)
    torch.testing.assert_close(y, (forward + backward.flip(1) + D[:, None] * args["x"]) * F.silu(z))
    torch.testing.assert_close(last, torch.stack([end, start], 1))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_state_carries_a_sequence_on(backend):
    args = arguments(14, options=False, requires_grad=False)
    A = args.pop("A")
    whole, end = ssd(A=A, **args, return_last_state=True, backend=backend)
    left, right = ({k: v[:, part] for k, v in args.items()} for part in (slice(6), slice(6, None)))
    first, state = ssd(A=A, **left, return_last_state=True, backend=backend)
    second, last = ssd(A=A, **right, initial_state=state, return_last_state=True, backend=backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end.to(last.dtype))


def test_a_diagonal_of_each_token():
    args = arguments(8, options=False, requires_grad=False)
    D = torch.randn(2, 8, 4, dtype=torch.float64)
    bare = ssd(**args, **FORMS["free"])
    torch.testing.assert_close(ssd(**args, D=D, **FORMS["free"]), bare + D[..., None] * args["x"])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, backend):
    args = arguments(5, directions=1 if form == "causal" else 2)

    def function(*values):
        named = dict(zip(args, values, strict=True))
        return ssd(**named, **FORMS[form], dt_softplus=True, chunk_size=2, return_last_state=True, backend=backend)

    torch.autograd.gradcheck(function, tuple(args.values()))


def test_noncausal_is_one_shared_state():
    args = arguments(9, options=False, requires_grad=False)
    x, w, B, C = args["x"], args["dt"].abs(), args["B"], args["C"]
    D = torch.randn(4, dtype=torch.float64)
    heads_B, heads_C = (v.repeat_interleave(2, 2) for v in (B, C))
    state = torch.einsum("bjh,bjhp,bjhn->bhpn", w, x, heads_B)
    expected = torch.einsum("bhpn,bihn->bihp", state, heads_C) + D[:, None] * x
    torch.testing.assert_close(noncausal_ssd(x, w, B, C, D), expected)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = noncausal_ssd(*(v[:, shuffle] for v in (x, w, B, C)), D)
    torch.testing.assert_close(shuffled, expected[:, shuffle])


def test_noncausal_gradcheck():
    args = arguments(4)
    torch.autograd.gradcheck(noncausal_ssd, tuple(args[k] for k in ("x", "dt", "B", "C", "D")))


WRONG = {
    "x": {"x": torch.zeros(2, 12, 4)},
    "no tokens": {k: torch.zeros(2, 0, *s) for k, s in (("x", (4, 3)), ("dt", (4,)), ("B", (2, 5)), ("C", (2, 5)))},
    "dt": {"dt": torch.zeros(2, 12, 3)},
    "A": {"A": torch.zeros(4, 5)},
    "groups": {"B": torch.zeros(2, 12, 3, 5), "C": torch.zeros(2, 12, 3, 5)},
    "C": {"C": torch.zeros(2, 12, 2, 6)},
    "D": {"D": torch.zeros(4, 3)},
    "z": {"z": torch.zeros(2, 12, 4, 4)},
    "initial_state": {"initial_state": torch.zeros(2, 2, 4, 3, 5)},
    "diagonal": {"diagonal": "twice"},
    "free but causal": {"diagonal": "free"},
    "chunk_size": {"chunk_size": 0},
    "dtype": {"dt": torch.zeros(2, 12, 4, dtype=torch.int64)},
    "mixed fp64": {"dt": torch.zeros(2, 12, 4, dtype=torch.float64)},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what):
    args = arguments(dtype=torch.float32, options=False, requires_grad=False) | WRONG[what]
    with pytest.raises(ValueError, match=what.split()[-1] if what in ("dt", "A", "C", "D", "z") else None):
        ssd(**args)


@pytest.mark.parametrize("name", ["z", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"])
def test_a_tensor_left_on_another_device_is_named(name):
    args = arguments(dtype=torch.float32, requires_grad=False)
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        ssd(**args)


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("MAMBAVISION_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_backend_by_argument_context_and_environment(no_environment, monkeypatch):
    args = arguments(dtype=torch.float32, options=False, requires_grad=False)
    expected = ssd(**args)
    with pytest.raises(RuntimeError, match=r"triton.*CUDA"):
        ssd(**args, backend="triton")
    with pytest.raises(ValueError, match="chunked"):
        ssd(**args, backend="cpu")
    with pytest.raises(RuntimeError, match=r"triton.*CUDA"), use_backend("triton"):
        ssd(**args)
    monkeypatch.setenv("MAMBAVISION_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"triton.*CUDA"):
        ssd(**args)
    with use_backend("chunked"):
        assert torch.equal(ssd(**args), expected)
    assert torch.equal(ssd(**args, backend="chunked"), expected)


UNSERVED = {
    "triton": {
        "d_state": ({"N": 128, "P": 32}, {}, "up to 64, got 32 and 128"),
        "headdim": ({"N": 16, "P": 65}, {}, "up to 64, got 65 and 16"),
        "float32": ({"dtype": torch.float32}, {}, "bfloat16 and float16, got float32"),
        "chunk size": ({}, {"chunk_size": 128}, "256 in bfloat16, got 128"),
    },
    "cuda": {
        "d_state": ({"N": 129}, {}, "up to 128, got 129"),
        "float16": ({"dtype": torch.float16}, {}, "takes bfloat16, got float16"),
        "chunk size": ({}, {"chunk_size": 48}, "32, 64, 128, 256, got 48"),
        "gradients": ({"P": 128, "requires_grad": True}, {}, "gradients take .* up to 64, got 128 and 64"),
    },
}


def on_cuda(P=64, N=64, dtype=torch.bfloat16, requires_grad=False) -> dict[str, Tensor]:
    """Shapes only, to be called in FakeTensorMode: which backend serves is decided without the device."""
    shapes = {"x": (2, 70, 4, P), "dt": (2, 70, 4), "A": (4,), "B": (2, 70, 1, N), "C": (2, 70, 1, N)}
    return {k: torch.empty(v, dtype=dtype, device="cuda").requires_grad_(requires_grad) for k, v in shapes.items()}


@pytest.fixture
def a_gpu(monkeypatch):
    """The choice of a backend finds one, whether there is one or not."""
    for module in (cuda, ssd_cuda):
        monkeypatch.setattr(module, "unavailable", lambda: None)


@pytest.mark.parametrize(("backend", "what"), [(name, what) for name, cases in UNSERVED.items() for what in cases])
def test_kernels_serve_only_what_was_seen_right(backend, what, a_gpu, no_environment):
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    sizes, options, reason = UNSERVED[backend][what]
    with FakeTensorMode():
        assert ssd(**on_cuda(), backend=backend).shape == (2, 70, 4, 64)
    with FakeTensorMode(), pytest.raises(RuntimeError, match=reason):
        ssd(**on_cuda(**sizes), **options, backend=backend)


PASSED_OVER = [
    ({}, {}, []),
    ({"P": 128, "N": 128}, {"chunk_size": 128}, []),
    ({"requires_grad": True}, {}, []),
    ({"P": 128, "requires_grad": True}, {}, ["cuda", "triton"]),
    ({"dtype": torch.float16}, {}, ["cuda"]),
    ({"dtype": torch.float32}, {}, ["cuda", "triton"]),
    ({"N": 129}, {}, ["cuda", "triton"]),
    ({}, {"chunk_size": 48}, ["cuda", "triton"]),
]


@pytest.mark.parametrize(("sizes", "options", "passed"), PASSED_OVER)
def test_the_first_that_can_serve_is_taken_and_others_are_logged_once(
    sizes, options, passed, a_gpu, no_environment, caplog
):
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    dispatch._log_once.cache_clear()
    with FakeTensorMode(), caplog.at_level("WARNING", "mambavision"):
        for _ in range(2):
            y = ssd(**on_cuda(**sizes), **options)
    assert y.shape == (2, 70, 4, sizes.get("P", 64))
    assert [record.message.split("'")[1] for record in caplog.records] == passed


def test_a_backend_of_the_scan_alone_is_refused(no_environment):
    args = arguments(dtype=torch.float32, options=False, requires_grad=False)
    with pytest.raises(RuntimeError, match="chunked"), use_backend("cpu"):
        ssd(**args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_in_low_precision_out(dtype):
    args = arguments(40, dtype=dtype, options=False, requires_grad=False)
    y, last = ssd(**args, dt_softplus=True, return_last_state=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    exact = ssd(**{k: v.double() for k, v in args.items()}, dt_softplus=True)
    assert (y.double() - exact).norm() / exact.norm() < 1e-2


def test_nothing_overflows_where_decays_are_extreme():
    args = arguments(80, dtype=torch.float32, options=False)
    args["A"] = torch.full_like(args["A"], -16.0).requires_grad_()
    args["dt"] = torch.full_like(args["dt"], 20.0).requires_grad_()
    y = ssd(**args, bidirectional=True)
    grads = torch.autograd.grad(y.sum(), list(args.values()))
    assert all(v.isfinite().all() for v in (y, *grads))


@pytest.mark.parametrize("form", FORMS)
def test_compile_in_one_graph(form):
    args = arguments(21, dtype=torch.float32, directions=1 if form == "causal" else 2)

    def function(*values):
        return ssd(**dict(zip(args, values, strict=True)), **FORMS[form], dt_softplus=True, chunk_size=8)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*args.values()), function(*args.values())
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), list(args.values())),
        torch.autograd.grad(expected.square().sum(), list(args.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(6, 4 * 3 + 4 + 2 * 5)
        self.A_log, self.D = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))

    def forward(self, tokens):
        x, dt, B, C = self.proj(tokens).split([12, 4, 5, 5], -1)
        return ssd(
            x.unflatten(-1, (4, 3)), dt, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D,
            dt_softplus=True, bidirectional=True,
        )  # fmt: skip


def test_export_of_a_module():
    torch.manual_seed(0)
    mixer, tokens = Mixer().eval(), torch.randn(2, 70, 6)
    program = torch.export.export(mixer, (tokens,))
    torch.testing.assert_close(program.module()(tokens), mixer(tokens))


def test_export_chooses_its_backend_where_it_runs():
    torch.manual_seed(0)
    mixer, tokens = Mixer().eval(), torch.randn(2, 70, 6)
    length = torch.export.Dim("length", min=1, max=4096)
    program = torch.export.export(mixer, (tokens,), dynamic_shapes=({1: length},)).module()
    for size in (1, 64, 150):
        tokens = torch.randn(2, size, 6)
        expected = mixer(tokens)
        torch.testing.assert_close(program(tokens), expected)
        with use_backend("reference"):
            torch.testing.assert_close(program(tokens), expected)
    with pytest.raises(RuntimeError, match="an exported scan has no gradient: train the module"):
        program(tokens).sum().backward()


@pytest.mark.parametrize("return_last_state", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_opcheck_of_what_runs_in_torch(backend, return_last_state):
    x, dt, A, B, C, D, _, dt_bias, state = (v.detach() for v in arguments(40, directions=2).values())
    D = D.expand(2, 40, 4).contiguous()
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.mambavision.ssd,
            (x, dt, A, B, C, D, dt_bias, state, True, True, True, 16, return_last_state, "automatic"),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_on_cuda(form, backend):
    dtype, chunk = (torch.float32, 16) if backend == "triton" else (torch.bfloat16, 32)
    args = arguments(40, directions=1 if form == "causal" else 2, dtype=dtype)
    x, dt, A, B, C, D, _, dt_bias, state = (v.detach().cuda().requires_grad_() for v in args.values())
    state = state if form != "causal" else state[:, None].detach().requires_grad_()
    D = D.detach().expand(2, 40, 4).contiguous().requires_grad_()
    options = (True, form != "causal", form != "free", chunk, True)
    torch.library.opcheck(torch.ops.mambavision.ssd, (x, dt, A, B, C, D, dt_bias, state, *options, backend))
    torch.library.opcheck(torch.ops.mambavision.ssd, (x, dt, A, B, C, None, None, None, *options[:4], False, backend))


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_values():
    args = {k: v.cuda() for k, v in arguments(300, dtype=torch.bfloat16, options=False, requires_grad=False).items()}
    options = {"dt_softplus": True, "bidirectional": True, "backend": "cuda"}
    ssd(**args, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd(**args, **options)
    args["x"].copy_(torch.randn_like(args["x"]))
    graph.replay()
    assert torch.equal(y, ssd(**args, **options))


@pytest.mark.gpu
def test_compile_by_inductor_on_cuda():
    torch.manual_seed(0)
    mixer = Mixer().cuda().to(torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True)
    for length in (70, 196, 300):
        tokens = torch.randn(2, length, 6, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(tokens), mixer(tokens), rtol=3e-2, atol=3e-2)
