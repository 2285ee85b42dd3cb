import pytest
import torch
from torch import nn

from mambavision.engine import export as exporting
from mambavision.engine.export import Exportable, check_target, export
from mambavision.layers import SS2D
from mambavision.ops import dispatch, multi_scan, selective_scan

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra 'export')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (the extra 'export')")
onnx_ops = pytest.importorskip("mambavision.engine.onnx_ops", reason="onnxscript is not installed (the extra 'export')")

torch.manual_seed(0)


class Scans(nn.Module):
    """Scans of pictures (B, 3, H, W): merged or not, gated, from initial states, on a backend that may be changed."""

    def __init__(self, orders) -> None:
        super().__init__()
        self.orders = orders
        self.backend = None
        self.A = nn.Parameter(-torch.rand(len(orders), 3, 5) - 0.1)
        self.B = nn.Parameter(torch.randn(3, 5))
        self.D, self.bias = nn.Parameter(torch.randn(len(orders), 3)), nn.Parameter(torch.randn(len(orders), 3))
        self.state = nn.Parameter(torch.randn(len(orders), 3, 5))

    def forward(self, images):
        tokens = images.flatten(2).mT
        K = len(self.orders)
        scale = torch.arange(1, K + 1, dtype=tokens.dtype)[:, None]
        delta = tokens[:, :, None] * scale
        B, C = (tokens @ self.B)[:, :, None] * scale, (tokens @ self.B).cos()[:, :, None] / scale
        state = self.state.expand(images.shape[0], -1, -1, -1)
        options = dict(grid=images.shape[2:], backend=self.backend)
        merged = multi_scan(tokens, delta, self.A, B, C, self.D, orders=self.orders, delta_bias=self.bias, **options)
        options |= dict(initial_state=state, merge=False, return_last_state=True, delta_softplus=False)
        each, last = multi_scan(tokens, delta, self.A, B, C, orders=self.orders, **options)
        u, b, c = images.flatten(2), B[:, :, 0].mT, C[:, :, 0].mT
        options = dict(initial_state=state[:, 0], return_last_state=True, backend=self.backend)
        gated, state = selective_scan(u, u.cos(), self.A[0], b, c, self.D[0], u.sin(), **options)
        return merged, each, last, gated, state


def scans(*orders):
    outputs = ("merged", "each", "last", "gated", "last_gated")
    return Exportable(Scans(orders).eval(), 3, ("images",), outputs, multiple=1)


class Mixed(nn.Module):
    """Pictures (B, 3, H, W) through an SS2D."""

    def __init__(self, *orders) -> None:
        super().__init__()
        self.mixer = SS2D(3, orders=orders)

    def forward(self, images):
        return self.mixer(images.permute(0, 2, 3, 1))

    def exportable(self):
        return Exportable(self.eval(), 3, ("images",), ("mixed",), multiple=2)


def test_scans_in_onnx_are_the_references(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_ops, "WORTHWHILE", 4 * 3 * 5)  # four scans in one chunk, one scan in four
    what = scans("col", "row_reverse", "row", "col_reverse")
    export(what, tmp_path / "x.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    nodes = model.graph.node
    assert {node.domain for node in nodes} == {""} and "Scan" in {node.op_type for node in nodes}
    assert not model.functions and not any(node.metadata_props for node in nodes)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    what.network.backend = "reference"
    for batch, height, width in ((1, 2, 3), (3, 7, 5)):
        (images,) = what.arguments(batch, height, width)
        with torch.no_grad():
            wanted = what.network(images)
        for y, expected in zip(session.run(None, {"images": images.numpy()}), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(y), expected)


def test_other_orders_are_exported_for_one_size_alone(tmp_path):
    with pytest.raises(ValueError, match="cannot write .*'hilbert' is exported for pictures of one size alone"):
        export(scans("hilbert"), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    export(Mixed("hilbert", "row").exportable(), tmp_path / "x.onnx", size=(5, 6), batch=2)


def test_a_file_that_gives_other_values_is_not_kept(tmp_path, monkeypatch):
    def without_D(x, delta, A, B, C, D, *others):
        return onnx_ops.scan(x, delta, A, B, C, None, *others)

    monkeypatch.setitem(onnx_ops.TRANSLATIONS, torch.ops.mambavision.scan.default, without_D)
    with pytest.raises(ValueError, match=r"mixed of 4x6 pixels differ by .*: not written"):
        export(Mixed("row", "col").exportable(), tmp_path / "x.onnx", size=(4, 6), batch=1)
    assert not list(tmp_path.iterdir())


def test_programs_run_on_the_backend_that_is_there(tmp_path, monkeypatch):
    what = Mixed("row", "col").exportable()
    assert export(what, tmp_path / "x.pt2").difference < 1e-5
    program = torch.export.load(tmp_path / "x.pt2").module()
    (images,) = what.arguments(3, 8, 10)
    wanted = what.network(images)
    monkeypatch.setattr(dispatch, "FAST", {})
    torch.testing.assert_close(program(images), wanted)


def test_what_is_missing_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_NEEDED", ("onnx", "no_such_runtime"))
    check_target(tmp_path / "x.pt2")
    with pytest.raises(ValueError, match=r"no_such_runtime: pip install .*\[export\]"):
        check_target(tmp_path / "x.onnx")
