"""The first call in a fresh process: run as a module it prints seconds as JSON; `measure` gives it empty caches."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(op: str, device: str) -> dict[str, float]:
    """Seconds of `import`, of `device` (its first tensor), of the `first` forward and backward and of the `second`.

    Raises RuntimeError with the last line of what the process complained about.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")}
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "bench.cold", op, device],
            env={**os.environ, **caches, "PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    marks = [time.perf_counter()]

    def passed() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    import torch

    import mambavision.ops  # noqa: F401

    seconds = {"import": passed()}
    from bench.rows import FIRST_CALLS

    op, device = sys.argv[1:]
    torch.zeros(1, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    (problem, contenders), *_ = FIRST_CALLS[op].problems(device, dtype, sliced=False)
    run = contenders["default" if device == "cuda" else "chunked"].run
    leaves = [v.requires_grad_() for v in problem.inputs.values()]
    seconds["device"] = passed()
    for name in ("first", "second"):
        y = run(*leaves)
        torch.autograd.grad(y.sum(), leaves)  # given a gradient, torch itself imports sympy: 2 s
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = passed()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
