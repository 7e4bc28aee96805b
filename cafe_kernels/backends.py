"""Which code runs an op, by one rule: the `backend` argument, else CAFE_KERNELS_BACKEND, else `triton` for tensors on a GPU and `cpu`
for others where they can run, else `reference`.

`triton` and `cpu` are modules of the op with `unavailable(*tensors) -> str | None`, which says why one cannot run.
"""

import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton")
# Options of a Triton launch that only its compiler knows.
ONE_VENDOR = {"maxnreg": "NVIDIA", "matrix_instr_nonkdim": "AMD", "waves_per_eu": "AMD"}


def choose_backend(backend: str | None, module: Callable[[str], ModuleType], *tensors: Tensor) -> str:
    """The backend that will run, or a ValueError that says why it cannot. `module(name)` imports the op's module of that name."""
    name = backend or os.environ.get("CAFE_KERNELS_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected {', '.join(BACKENDS)}")
    chosen = name or ("triton" if tensors[0].is_cuda else "cpu")
    if chosen == "reference":
        return chosen
    try:
        reason = module(chosen).unavailable(*tensors)
    except ImportError as error:  # triton is too old, or has no wheels for the platform
        reason = missing(error)
    if reason and name:
        raise ValueError(f"backend {name!r} cannot run: {reason}")
    if reason and tensors[0].is_cuda:
        warnings.warn(
            f"a GPU is used through plain PyTorch, slowly, as the triton backend cannot run: {reason}", stacklevel=3
        )
    return "reference" if reason else chosen


def missing(error: ImportError) -> str:
    """Why the module of a backend cannot be imported, and what to do."""
    hint = '; a GPU build of torch brings it, pip install "cafe-kernels[gpu]" adds it' if error.name == "triton" else ""
    return f"{error}{hint}"


def array(x: Tensor | None) -> Any:
    """A CPU tensor's own memory as numpy, whatever autograd says, for the C++ extension: bfloat16 as its bits."""
    if x is None:
        return None
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy(force=True)


def machine() -> dict[str, Any]:
    """What the C++ extension may use: CAFE_KERNELS_ISA (auto, portable, avx2 or avx512) forces a code path."""
    return {"threads": torch.get_num_threads(), "isa": os.environ.get("CAFE_KERNELS_ISA", "auto")}


def launchable(config: dict[str, int]) -> dict[str, int]:
    """A Triton kernel's configuration without what only the other vendor's compiler knows."""
    vendor = "AMD" if torch.version.hip else "NVIDIA"
    return {key: value for key, value in config.items() if ONE_VENDOR.get(key, vendor) == vendor}


def vendor_options(config: dict[str, Any]) -> dict[str, Any]:
    """What only one vendor's compiler knows: the `options` of a case for cafe_kernels.compile, of which each compiler takes its own."""
    return {key: config[key] for key in ONE_VENDOR if key in config}
