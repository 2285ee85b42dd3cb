"""tools/benchmark.py: its gate, its clocks, its floors, its tables."""

import runpy
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from mambavision.ops import selective_scan, ssd

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.fixture
def run_tool(monkeypatch, capfd):
    """Run the tool in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOLS / "benchmark.py"), run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    return call


def tiny_rows():
    from bench.scan import MultiScan, SelectiveScan
    from bench.ssd import BidirectionalSSD

    return {
        "cross": MultiScan(2, 6, (4, 5), 3),
        "slow": MultiScan(2, 6, (4, 5), 3, "bidirectional", slow=True),
        "groups": SelectiveScan(2, 6, 11, 3, 2),
        "ssd": BidirectionalSSD(2, 19, 3, 5, 4),
    }


def problem_of(name, dtype=torch.float32, sliced=False):
    (problem, contenders), *_ = tiny_rows()[name].problems("cpu", dtype, sliced=sliced)
    return problem, contenders


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("name", ["cross", "slow", "groups", "ssd"])
def test_gate_lets_right_implementations_pass(name, sliced, capsys, monkeypatch):
    from bench import ops, scan

    monkeypatch.setattr(scan, "COMPARED_STATES", 4 * 20 * 3 * 2)  # two of the channels are compared
    problems = tiny_rows()[name].problems("cpu", torch.float32, sliced=sliced)
    passed = ops.gate(problems, name, None)
    assert {"reference", "chunked"} <= set(passed)
    assert ("SDPA" in passed) == (name == "ssd")
    said = capsys.readouterr().err
    assert all(" is off by " not in line and "cannot run" in line for line in said.splitlines()), said


def wrong_by_two_percent(right, *inputs):
    return 1.02 * right(*inputs)


def wrong_in_a_gradient(right, *inputs):
    """The right result, but one input's gradient is left out."""
    first, second, *rest = inputs
    return right(first, second.detach(), *rest) + 0 * second.sum()


def wrong_in_the_last_image(right, *inputs):
    y = right(*inputs)
    return torch.cat([y[:-1], 1.1 * y[-1:]])


def broken(right, *inputs):
    raise RuntimeError("this GPU is not served\nand more")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("name", ["cross", "groups", "ssd"])
@pytest.mark.parametrize(
    "wrong, said",
    [
        (wrong_by_two_percent, "y is off by 2.0e-02"),
        (wrong_in_a_gradient, "is off by 1.0e+00 (allowed 1e-05)"),
        (wrong_in_the_last_image, "y is off by"),
        (broken, "not timed, RuntimeError: this GPU is not served"),
    ],
)
def test_gate_refuses_wrong_implementations(name, sliced, wrong, said, capsys):
    from bench.ops import gate
    from bench.problem import Contender

    problem, contenders = problem_of(name, sliced=sliced)
    right = contenders["chunked"]
    found = {"right": right, "wrong": Contender(partial(wrong, right.run))}
    passed = gate([(problem, found)], name, None)
    assert list(passed) == ["right"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: wrong: not timed, ") and said in line


def test_a_row_with_a_wrong_backend_is_timed_without_it(capsys, monkeypatch):
    from bench import ops
    from bench.scan import MultiScan

    real = MultiScan.problems

    def with_a_wrong_one(self, *args, **kwargs):
        ((problem, contenders),) = real(self, *args, **kwargs)
        reference = contenders["reference"].run
        contenders["reference"] = contenders["reference"]._replace(run=partial(wrong_in_a_gradient, reference))
        return [(problem, contenders)]

    monkeypatch.setattr(MultiScan, "problems", with_a_wrong_one)
    monkeypatch.setattr(MultiScan, "small", lambda self: self)
    host = ops.Host("cpu", torch.float32, 0.001, None)
    (lines,) = ops.run({"cross": tiny_rows()["cross"]}, [], host)
    assert "reference: not timed, delta is off by" in capsys.readouterr().err
    assert "reference" not in {line.implementation for line in lines}
    assert {(line.call, line.mode) for line in lines if line.implementation == "chunked"} == {
        ("forward", "eager"),
        ("backward", "eager"),
    }


def test_a_wrong_yardstick_stops_the_row(capsys, monkeypatch):
    from bench import ops

    from mambavision.kernels import chunked

    real = chunked.scan

    def slightly_wrong(*args, **kwargs):
        y, state = real(*args, **kwargs)
        return 1.0001 * y, state

    monkeypatch.setattr(chunked, "scan", slightly_wrong)
    assert not list(ops.run({"cross": tiny_rows()["cross"]}, [], ops.Host("cpu", torch.float32, 0.001, None)))
    assert "chunked in float64 is no yardstick: y is off by 1.0e-04" in capsys.readouterr().err


@pytest.fixture
def stand_in(monkeypatch):
    """mamba_ssm's two functions, from our own operators."""

    def selective_scan_fn(u, delta, A, B, C, D, z, bias, softplus):
        assert z is None and all(v.is_contiguous() for v in (u, delta, B, C))
        return selective_scan(u, delta, A, B, C, D, None, bias, softplus)

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, dt_softplus=False):
        return ssd(x, dt, A, B, C, D, chunk_size=chunk_size, dt_softplus=dt_softplus)

    for name, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
    ):
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", ["cross", "slow", "ssd"])
def test_peers_compute_the_same(name, stand_in, capsys):
    from bench.ops import gate
    from bench.ssd import mamba_ssm

    from mambavision.ops import order_table

    row, (problem, _) = tiny_rows()[name], problem_of(name)
    if name == "ssd":
        peers = mamba_ssm()
    else:
        peers = {"mamba_ssm": row.materialised(order_table(row.orders, row.grid).index.long())}
    passed = gate([(problem, peers)], name, None)
    assert set(passed) == set(peers), capsys.readouterr().err
    for entrant in passed.values():
        for gradient, leaf in zip(entrant.backward()(), entrant.leaves, strict=True):
            assert gradient.shape == leaf.shape


def test_floors_are_bytes_or_exponentials():
    from bench.roofs import Roofs
    from bench.rows import ROWS

    roofs = Roofs(2.95e12, 4.15e12)
    expected = {
        "vmamba-t": 0.158, "yolo-p2": 0.859, "yolo-p3": 0.430, "yolo-p5": 0.00336, "dim-256": 0.155,
        "dim-1024": 0.309, "serpent": 0.412, "serpent-next": 0.206,
    }  # fmt: skip
    for name, floor in expected.items():
        assert roofs.floor_ms(*ROWS["cuda"][name].work(2)["forward"]) == pytest.approx(floor, rel=0.01), name
    x_and_y = 2 * 2 * 16384 * 36 * 64
    for name in ("ssd-64x256", "ssd-1x16384"):
        assert roofs.floor_ms(*ROWS["cuda"][name].work(2)["forward"]) == pytest.approx(
            1e3 * x_and_y / 2.95e12, rel=0.05
        )


def test_runs_take_turns_and_quantiles_are_in_order():
    from bench.timing import ROUNDS, in_turn

    order = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 1e-4)
    assert "".join(order).replace("aa", "a") != "".join(order) and set(order) == {"a", "b"}
    turns = [order[0]] + [b for a, b in zip(order, order[1:], strict=False) if a != b]
    assert turns == ["a", "b"] * ROUNDS
    for t in times.values():
        assert 0 < t.low <= t.median <= t.high


def test_ops_prints_the_table_and_writes_csv(run_tool, tmp_path):
    from bench import report

    path = tmp_path / "ops.csv"
    code, text, err = run_tool("ops", "--rows", "384x196", "--budget", 0.02, "--csv", path)
    assert code == 0, err
    lines = report.read(str(path))
    figures = report.Figures(lines)
    assert len({line.implementation for line in lines}) * 2 == len(lines) >= 4
    for line in lines:
        reference = figures.get("median_ms", line.row, "reference", line.call)
        assert line.vs_reference == pytest.approx(reference / line.median_ms, rel=1e-4)
        assert line.p20_ms <= line.median_ms <= line.p80_ms
        assert (line.gpu_name, line.dtype, line.torch) == (
            f"CPU, {torch.get_num_threads()} threads",
            "float32",
            torch.__version__,
        )
        assert f"| {line.shape} | {line.implementation} " in text and f"{line.median_ms:.3f}" in text
    assert "triton: not timed" in err and text.rstrip().endswith("|")


def test_some_implementations_alone(run_tool, tmp_path):
    from bench import report

    path = tmp_path / "ops.csv"
    code, _, err = run_tool(
        "ops", "--rows", "384x196", "--only", "chunked", "reference", "--budget", 0.01, "--csv", path
    )
    assert code == 0 and "not timed" not in err
    assert {line.implementation for line in report.read(str(path))} == {"chunked", "reference"}
    code, _, err = run_tool("ops", "--rows", "384x196", "--only", "nobody")
    assert code == 1 and err.splitlines()[-1] == "benchmark: nothing was timed"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "--rows", "384x196", "nowhere"], "no row nowhere on cpu: choose from 384x196"),
        (["ops", "--rows", "yolo-p5"], "no row yolo-p5 on cpu"),
        (["ops", "--csv", "no/such/folder/x.csv"], "no folder to write no/such/folder/x.csv to"),
        (["ops", "--budget", "0"], "--threads and --budget must be positive"),
        (["ops", "--threads", "0"], "--threads and --budget must be positive"),
        (["tables", "nowhere.csv"], "nowhere.csv: no such file; benchmark.py ops --csv nowhere.csv makes one"),
        (["tables", "nowhere.csv", "--roofs", "0", "4"], "--roofs must be positive"),
        (["tables", str(TOOLS / "benchmark.py")], "is no CSV of tools/benchmark.py"),
    ],
)
def test_bad_options_are_one_line(run_tool, arguments, message):
    code, text, err = run_tool(*arguments)
    assert code == 2 and not text
    (line,) = err.splitlines()
    assert line.startswith("benchmark: ") and message in line


def test_a_missing_gpu_is_one_line(run_tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run_tool("ops", "--device", "cuda")
    assert code == 2 and err.splitlines() == ["benchmark: --device cuda needs an NVIDIA GPU that torch can use"]


def line_of(row, implementation, call, ms, **more):
    from bench.report import Line
    from bench.rows import ROWS

    workload = ROWS["cuda"][row]
    return Line(
        date="2026-01-02", gpu_name="GPU, of a kind", torch="2.11", triton="3.6", copy_tb_s=3.0, exp2_t_s=4.0,
        op=workload.op, row=row, shape=str(workload), dtype="bfloat16", implementation=implementation, call=call,
        mode="eager", median_ms=ms, p20_ms=ms, p80_ms=ms, **more,
    )  # fmt: skip


def test_tables_say_what_was_reached(run_tool, tmp_path):
    from bench import report

    lines = [
        line_of("yolo-p2", "default", "forward", 1.0, floor_ms=0.5, over_floor=2.0, memory_mb=10.0, launches=2),
        line_of("yolo-p2", "default", "backward", 1.0),
        line_of("yolo-p2", "mamba_ssm", "forward", 4.0),
        line_of("yolo-p2", "mamba_ssm", "backward", 1.99),
        line_of("yolo-p5", "default", "forward", 1.0, over_floor=9.0),
        line_of("yolo-p5", "mamba_ssm", "forward", 1.5),
        line_of("ssd-4x4096", "default", "forward", 0.2),
        line_of("ssd-4x4096", "SDPA", "forward", 1.0),
        line_of("ssd-4x4096", "mamba_ssm", "forward", 1.0),
    ]
    for part, seconds in {"import": 3.0, "device": 0.2, "first": 5.1, "second": 0.001}.items():
        first = line_of("ssd-4x4096", "default", part, 1e3 * seconds)
        lines.append(first._replace(op="first call", row="ssd"))
    path = tmp_path / "ops.csv"
    report.write(str(path), lines)
    assert report.read(str(path)) == lines
    code, text, err = run_tool("tables", path)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    p2 = "yolo-p2: B16 D128 K4 L25600 N16"
    assert [p2, "1.000", "4.000", "4 *", "0.500", "2"] in rows
    assert [p2, "1.000", "1.990", "**1.99**", "-", "-"] in rows
    assert ["yolo-p2", "10 / -", "- / -", "2 / -", "- / -"] in rows
    p5 = "yolo-p5: B1 D512 K4 L400 N16"
    assert [p5, "1.000", "1.500", "1.5", "-", "9"] in rows
    assert ["ssd 4 x 4096", "0.200", "1.000", "0.2", "1.000", "5", "-", "-", "-", "-"] in rows
    assert ["ssd", "3.00", "0.20", "**5.10**", "0.00"] in rows
    text = run_tool("tables", path, "--roofs", 1.0, 1000)[1]  # 734 MB
    assert "copy 1.00 TB/s" in text and "| 0.734 | 1.36 *" in " ".join(text.split())


def test_first_call_says_why_it_failed():
    from bench import cold

    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        cold.measure("nothing", "cpu")


@pytest.mark.gpu
def test_ops_on_a_gpu(run_tool, tmp_path):
    from bench import report

    path = tmp_path / "ops.csv"
    code, text, err = run_tool("ops", "--device", "cuda", "--rows", "yolo-p5", "first-call", "--csv", path)
    assert code == 0, err
    figures = report.Figures(report.read(str(path)))
    for call in report.CALLS:
        for mode in ("eager", "graph"):
            assert figures.get("over_floor", "yolo-p5", "default", call, mode) > 1
        assert figures.get("launches", "yolo-p5", "default", call) >= 1
    assert figures.get("memory_mb", "yolo-p5", "default", "forward") >= 400 * 512 * 2 / 1e6  # y
    assert set(report.first_calls(figures)) == {"multi_scan", "ssd"}
    assert "yolo-p5" in text and run_tool("tables", path)[0] == 0
