"""State-space models for vision on one selective-scan operator."""

import importlib.machinery
import importlib.util
import pathlib
import sys

__version__ = "0.1.0"

_here = pathlib.Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout: the device code lies beside the package, in kernels/
    _spec = importlib.machinery.ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_here.parent / "kernels")]
    kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
