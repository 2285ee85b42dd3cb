"""Imports flow one way, and importing the package does nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "ops", "layers", "backbones", "engine", "detection", "restoration", "diffusion")
TASKS = ("detection", "restoration", "diffusion")
OPENMMLAB = {"mmengine", "mmdet", "mmcv"}
THIRD_PARTY = {  # of each layer, beside the standard library
    "kernels": {"torch", "triton"},
    "ops": {"torch", "numpy"},
    "layers": {"torch", "numpy"},
    "backbones": {"torch", "numpy", "timm"},
    "engine": {"torch", "torchvision", "numpy", "safetensors", "cv2", "PIL", "tqdm"}
    | {"matplotlib"}  # comes with mmengine and mmdet
    | {"onnx", "onnxscript", "onnxruntime"}  # the extra "export"
    | OPENMMLAB,
    "detection": {"torch", "torchvision", "numpy", "timm", "cv2", "PIL", "pycocotools", "safetensors", "rich", "tqdm"}
    | {"matplotlib"}  # comes with mmengine and mmdet
    | OPENMMLAB,
    "restoration": {"torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "rich", "tqdm", "mmengine"},
    "diffusion": {"torch", "torchvision", "numpy", "cv2", "PIL", "safetensors", "rich", "tqdm", "mmengine"}
    | {"diffusers", "timm"},
}
BELOW = {
    "kernels": {"kernels"},
    "ops": {"kernels", "ops"},
    "layers": {"ops", "layers"},
    "backbones": {"ops", "layers", "backbones"},
    "engine": {"ops", "engine"},
    **{task: {"ops", "layers", "backbones", "engine", task} for task in TASKS},
}


def _folder(layer: str) -> Path:
    return REPOSITORY / "kernels" if layer == "kernels" else REPOSITORY / "mambavision" / layer


def _imports(path: Path, package: str) -> set[str]:
    """Absolute names of the modules that a file of `package` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def _violations(layer: str, path: Path, package: str) -> list[str]:
    wrong = []
    for name in _imports(path, package):
        root, *rest = name.split(".")
        if root == "mambavision":
            allowed = not rest or rest[0] in BELOW[layer] or rest[0] not in (*LAYERS, *TASKS)
        else:
            allowed = root in sys.stdlib_module_names or root in THIRD_PARTY[layer]
        if not allowed:
            wrong.append(f"{path.name} of {layer} imports {name}")
    return wrong


def test_every_folder_has_a_rule():
    folders = {path.parent.name for path in (REPOSITORY / "mambavision").glob("*/__init__.py")}
    assert folders | {"kernels"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_flow_one_way(layer: str):
    files = sorted(_folder(layer).rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        inner = path.parent.relative_to(_folder(layer)).parts
        wrong += _violations(layer, path, ".".join(("mambavision", layer, *inner)))
    assert not wrong


def test_the_rule_sees_a_violation(tmp_path: Path):
    path = tmp_path / "bad.py"
    path.write_text("import mmdet.models\nfrom ..detection import head\nfrom mambavision import layers\nimport math\n")
    found = _violations("ops", path, "mambavision.ops")
    assert len(found) == 3 and not any("math" in line for line in found)


def test_import_is_lean():
    code = """
import sys
import mambavision, mambavision.ops, mambavision.kernels
import torch
heavy = {"mmdet", "mmcv", "mmengine", "triton", "timm", "cv2", "torchvision", "diffusers"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
