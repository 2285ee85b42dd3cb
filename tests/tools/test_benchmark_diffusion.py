import csv
import math
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/benchmark_diffusion.py"), run_name="benchmark_diffusion")
NETWORKS = "--networks dit_s dim_s --device cpu --seconds 0".split()


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["benchmark_diffusion", *NETWORKS, *options])
    TOOL["main"]()


def test_figures_of_networks_that_take_turns(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.csv"
    options = "--tokens 16 --batch 2 --blocks 1 --orders raster cross --csv".split()
    run(monkeypatch, *options, str(path))
    rows = list(csv.DictReader(path.open()))
    assert [(r["network"], r["mixer"], r["orders"], r["what"]) for r in rows] == [
        (*contender, what)
        for what in ("forward", "training step")
        for contender in (("dit_s", "attention", ""), ("dim_s", "ssd", "raster"), ("dim_s", "ssd", "cross"))
    ]
    for row in rows:
        assert float(row["images/s"]) == pytest.approx(2e3 / float(row["ms"])) and row["blocks"] == "1"
    assert "1.00" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row(tmp_path, monkeypatch, capsys):
    def calls_of(net, batch, phase):
        raise TOOL["torch"].OutOfMemoryError

    monkeypatch.setitem(TOOL["main"].__globals__, "calls_of", calls_of)
    path = tmp_path / "figures.csv"
    run(monkeypatch, "--tokens", "16", "--what", "forward", "--csv", str(path))
    assert "out of memory" in capsys.readouterr().out
    assert [float(row["ms"]) for row in csv.DictReader(path.open())] == [math.inf] * 2


@pytest.mark.parametrize(
    "options, message",
    [(("--tokens", "15"), "no square"), (("--profile",), "NVIDIA GPU"), (("--graphs",), "NVIDIA GPU")],
)
def test_wrong_input(options, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, *options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [(), ("--graphs", "--profile")], ids=["launched", "graphs"])
def test_on_a_gpu(options, tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.csv"
    options += ("--device", "cuda", "--eager", "--tokens", "64", "--batch", "2", "--blocks", "2", "--csv", str(path))
    run(monkeypatch, *options)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 4 and all(float(row["MB"]) > 0 and float(row["ms"]) > 0 for row in rows)
    assert all(row["what"].endswith("graph") == ("--graphs" in options) for row in rows)


@pytest.mark.gpu
def test_a_graph_trains_as_its_work_does():
    torch = TOOL["torch"]
    args = TOOL["argparse"].Namespace(mixer="ssd", blocks=2, eager=True)
    found = []
    for graph in (False, True):
        net = TOOL["build"]("dim_s", "cross", 64, torch.device("cuda"), args)
        torch.manual_seed(1)
        work, follow = TOOL["calls_of"](net, 2, "training step")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work(), follow()
        torch.cuda.synchronize()
        if graph:
            net.zero_grad()
            work = TOOL["record"](work, stream, torch.cuda.graph_pool_handle())
        for _ in range(3):
            work(), follow()
        found.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
