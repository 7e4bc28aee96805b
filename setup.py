"""Builds `cafe_kernels._C` from csrc/. The extension speaks numpy buffers, never torch, so one wheel serves every torch.

No -march flag: files that want wide vectors choose their instruction set at run time (csrc/cpu.h).
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "cafe_kernels._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra", "-g0"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
