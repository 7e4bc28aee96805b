"""Counts what a Triton kernel reads, writes and multiplies, by running it under Triton's interpreter on the CPU.

The interpreter executes the kernel's own loads, stores and dots program by program, so the counts are those of the source: each
active (unmasked) element of each load and store, and 2 * M * N * K for each dot, masked rows and columns included.
What a GPU's caches then save, and what a compiler reads twice, is not in them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

CHUNK = 1 << 20  # addresses kept before duplicates are removed


@dataclass
class Traffic:
    """Global memory in bytes, and floating-point operations, of all launches of a kernel.

    lanes: every active element of every load and store, as if nothing were shared.
    issued: an address that several elements of one load or store name is counted once, as it moves once.
    distinct: an address counts once a launch; no kernel that needs what it reads can move less.
    """

    loaded_lanes: int = 0
    stored_lanes: int = 0
    loaded_issued: int = 0
    stored_issued: int = 0
    loaded_distinct: int = 0
    stored_distinct: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def lanes(self) -> int:
        return self.loaded_lanes + self.stored_lanes

    @property
    def issued(self) -> int:
        return self.loaded_issued + self.stored_issued

    @property
    def distinct(self) -> int:
        return self.loaded_distinct + self.stored_distinct


class _Distinct:
    """The number of distinct addresses in a stream of them."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, addresses: np.ndarray) -> None:
        self.parts.append(addresses)
        self.size += len(addresses)
        if self.size > 2 * CHUNK + len(self.parts[0]):
            self.parts = [np.unique(np.concatenate(self.parts))]
            self.size = len(self.parts[0])

    def count(self) -> int:
        return len(np.unique(np.concatenate(self.parts))) if self.parts else 0


def count_traffic(run: Callable[[], Any]) -> dict[str, Traffic]:
    """What each kernel that `run()` launches moves and computes, by the kernel's name.

    Raises:
        RuntimeError: without TRITON_INTERPRET=1 in the environment before Triton is imported.

    Example:
        >>> count_traffic(lambda: distance_attention(q, k, v, backend="triton"))["short_forward"].issued
    """
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "traffic is counted under Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    totals: dict[str, Traffic] = defaultdict(Traffic)
    now = Traffic()
    seen: dict[tuple[str, int], _Distinct] = defaultdict(_Distinct)

    def access(kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data
        active = addresses[np.broadcast_to(mask.data, addresses.shape)].ravel()
        once = np.unique(active)
        setattr(now, f"{kind}_lanes", getattr(now, f"{kind}_lanes") + size * len(active))
        setattr(now, f"{kind}_issued", getattr(now, f"{kind}_issued") + size * len(once))
        seen[kind, size].add(once)

    def load(original: Any, self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        access("loaded", pointers, mask)
        return original(self, pointers, mask, *rest)

    def store(original: Any, self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        access("stored", pointers, mask)
        return original(self, pointers, value, mask, *rest)

    def atomic(original: Any, self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        access("loaded", pointers, mask)
        access("stored", pointers, mask)
        return original(self, operation, pointers, value, mask, *rest)

    def dot(original: Any, self: Any, a: Any, b: Any, *rest: Any) -> Any:
        now.flops += 2 * a.data.size * b.data.shape[-1]
        return original(self, a, b, *rest)

    def launch(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal now
        now = Traffic(launches=1)
        seen.clear()
        result = original(self, *args, **kwargs)
        for (kind, size), addresses in seen.items():
            setattr(now, f"{kind}_distinct", getattr(now, f"{kind}_distinct") + size * addresses.count())
        totals[self.fn.__name__] += now
        return result

    with (
        _wrapped(InterpreterBuilder, "create_masked_load", load),
        _wrapped(InterpreterBuilder, "create_masked_store", store),
        _wrapped(InterpreterBuilder, "create_atomic_rmw", atomic),
        _wrapped(InterpreterBuilder, "create_dot", dot),
        _wrapped(GridExecutor, "__call__", launch),
    ):
        run()
    return dict(totals)


@contextmanager
def _wrapped(owner: type, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)
