"""Build of mambavision-zoo: pure Python, plus a plain-C library for the CPU that may fail to build without harm."""

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError


class BuildPlainC(build_ext):
    """Compile with OpenMP, else without it, else leave the library out."""

    def build_extension(self, ext: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        flags = ["/O2"] if msvc else ["-O3", "-fno-math-errno", "-Wno-psabi"]
        openmp = "/openmp" if msvc else "-fopenmp"
        for extra in ([openmp], []):
            ext.extra_compile_args = flags + extra
            ext.extra_link_args = [] if msvc else extra
            try:
                return super().build_extension(ext)
            except (CCompilerError, BaseError) as error:
                reason = str(error).splitlines()[0]
        print(f"mambavision-zoo: installing without the C scan, the CPU runs the slower torch one ({reason})")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols  # opened with ctypes: there is no PyInit function to export


setup(
    packages=[*find_packages(include=["mambavision", "mambavision.*"]), "mambavision.kernels"],
    package_dir={"mambavision.kernels": "kernels"},
    package_data={"mambavision.kernels": ["*.c", "*.cu", "*.cuh"]},
    ext_modules=[Extension("mambavision.kernels._scan", ["kernels/scan.c"], optional=True)],
    cmdclass={"build_ext": BuildPlainC},
)
