"""The decorator of every Triton kernel that is launched: its numbers have the types that are written, whatever their values.

Triton by itself compiles a kernel anew for a number that is 1, that is a multiple of 16, or that does not fit in 32 bits. A batch's
number of tokens, a step, a seed are all of these by turns, so training would stop to compile again and again. And what is compiled
beforehand (cafe_kernels.compile) would not be what a launch asks for.
"""

import re
from collections.abc import Callable
from typing import Any

import triton

from cafe_kernels import stored

OLDEST = (3, 7)  # Triton, as in the extra gpu of pyproject.toml
if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < OLDEST:
    raise ImportError(
        f"triton {triton.__version__} is too old: update torch (its triton must be >= {'.'.join(map(str, OLDEST))})"
    )
stored.use()  # whoever imports a kernel that is launched comes by here


def types_of(numbers: dict[str, str]) -> dict[str, str]:
    """{"i32": "tokens count"} by name: {"tokens": "i32", "count": "i32"}."""
    return {name: kind for kind, names in numbers.items() for name in names.split()}


def launched(**numbers: str) -> Callable[[Any], Any]:
    """`@launched(i32="tokens count", i64="seed")`: triton.jit with these types of its whole numbers; names it does not have are ignored."""
    types = types_of(numbers)

    def decorate(function: Any) -> Any:
        function.__annotations__ |= types
        return triton.jit(function, do_not_specialize=list(types))

    return decorate
