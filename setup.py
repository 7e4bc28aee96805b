"""Builds `cafe_kernels._C` from csrc/. The extension speaks numpy buffers, never torch, so one wheel serves every torch.

No -march flag: files that want wide vectors choose their instruction set at run time (csrc/cpu.h).

CAFE_KERNELS_PRECOMPILE=sm_90 (or several: sm_80,sm_90) compiles the Triton kernels as well, into cafe_kernels/compiled. That is done by
the torch and triton that are installed beside pip, not by those of an isolated build: only the same Triton finds them again.
"""

import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()
COMPILE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from cafe_kernels.compile import main; sys.exit(main())"


class build_kernels(build_ext):
    def run(self) -> None:
        targets = os.environ.get("CAFE_KERNELS_PRECOMPILE", "").replace(",", " ").split()
        root = Path("." if self.inplace else self.build_lib).resolve()
        compiled = root / "cafe_kernels/compiled"
        if not self.inplace:
            shutil.rmtree(compiled, ignore_errors=True)  # an earlier build's, which the wheel would contain
        # -I: without the paths that an isolated build sets.
        python = [sys.executable, "-I", "-c"]
        options = [option for target in targets for option in ("--target", target)]
        if targets and subprocess.run([*python, "import torch, triton"]).returncode:
            sys.exit("CAFE_KERNELS_PRECOMPILE needs torch and triton: install them into this environment first")
        super().run()
        if targets and subprocess.run([*python, COMPILE, str(root), *options, "--out", str(compiled)]).returncode:
            sys.exit(f"the Triton kernels could not be compiled for {', '.join(targets)}: see above")


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
    cmdclass={"build_ext": build_kernels},
)
