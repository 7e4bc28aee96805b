"""Compiled Triton kernels kept in a folder, so that a launch finds them in place of compiling them.

    FOLDER/<key>/<kernel>.json, <kernel>.cubin or .hsaco

The key is Triton's own: of its version and compiler, the kernel's source, the types and constants of its arguments, the options, the GPU.
So what was stored by another release of either is not found, and compiled as ever. `python -m cafe_kernels.compile --out FOLDER` writes
such a folder; the one beside this file is filled by CAFE_KERNELS_PRECOMPILE=sm_90 pip install; CAFE_KERNELS_STORE names another.
"""

import os
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("compiled")


def folder() -> Path:
    """Where stored kernels are looked for; it need not exist."""
    return Path(os.environ.get("CAFE_KERNELS_STORE") or FOLDER)


@cache
def use() -> bool:
    """From here on Triton's launches look into `folder()` first, unless there is none, or TRITON_CACHE_MANAGER asks for another way."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    if "CAFE_KERNELS_STORE" in os.environ and not folder().is_dir():
        warnings.warn(f"CAFE_KERNELS_STORE={folder()} is not a folder: kernels will be compiled", stacklevel=4)
    if not folder().is_dir() or knobs.cache.manager_class is not None:
        return False

    class Stored(FileCacheManager):
        def get_group(self, filename: str) -> dict[str, str] | None:
            kept = folder() / self.key
            if (kept / filename).is_file():
                return {file.name: str(file) for file in kept.iterdir()}
            return super().get_group(filename)

    knobs.cache.manager_class = Stored
    return True


def keep(compiled: Any, out: Path) -> None:
    """Stores one of Triton's CompiledKernels in the folder `out`: the binary and what a launch must know of it."""
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_manager

    binary = "." + make_backend(compiled.metadata.target).binary_ext
    entry = out / get_cache_manager(compiled.hash).key
    unfinished = out / f".{entry.name}.{os.getpid()}"
    unfinished.mkdir(parents=True)
    for name, path in compiled.metadata_group.items():
        if Path(name).suffix in (".json", binary):
            shutil.copyfile(path, unfinished / name)
    try:
        unfinished.rename(entry)
    except OSError:  # it is there already: the same key, the same kernel
        shutil.rmtree(unfinished)
