"""Kernels with known faults and known traffic, for test_compile.py: a file of its own, since other processes import it."""

import re

import torch
import triton
import triton.language as tl

from cafe_kernels.compile import compile_case

ROWS, COLUMNS, TILE = 50, 48, 64


@triton.jit
def product(a, b, out, rows, columns, TILE: tl.constexpr):
    """out (rows, columns) = a (rows, columns) @ b (columns, columns), in one tile."""
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None]
    left = tl.load(a + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)
    right = tl.load(b + i * columns + j, mask=(i < columns) & (j < columns), other=0.0)
    tl.store(out + i * columns + j, tl.dot(left, right).to(out.dtype.element_ty), mask=(i < rows) & (j < columns))


@triton.jit
def spilling(x, out, SIZE: tl.constexpr):
    """All of x is needed before the first result, and one warp may not have the registers to hold it."""
    i = tl.arange(0, SIZE)
    values = tl.load(x + i)
    tl.store(out + i, values / tl.sum(values))


@triton.jit
def scaled(x, bias, out, repeats):
    """out (4, 16) = x * repeats + bias of the row; every x is read `repeats` times. bias is (4,)."""
    i, j = tl.arange(0, 4)[:, None], tl.arange(0, 16)[None]
    total = tl.load(bias + i + 0 * j)
    for _ in range(repeats):
        total += tl.load(x + i * 16 + j)
    tl.store(out + i * 16 + j, total)


@triton.jit
def counting(x, counts):
    tl.atomic_add(counts + tl.load(x + tl.arange(0, 16)), 1)


def run_product() -> None:
    a, b = torch.randn(ROWS, COLUMNS).half(), torch.randn(COLUMNS, COLUMNS).half()
    product[(1,)](a, b, torch.empty_like(a), ROWS, COLUMNS, TILE)


def run_scaled() -> None:
    x, bias, out = torch.randn(4, 16), torch.randn(4), torch.empty(4, 16)
    scaled[(2,)](x, bias, out, 3)


def run_counting() -> None:
    counting[(1,)](torch.arange(16, dtype=torch.int32) // 2, torch.zeros(8, dtype=torch.int32))


def _case(name, kernel, types, constexprs=None, num_warps=4, dtype="fp16", **more):
    pointers = {n: t for n, t in zip(kernel.arg_names, types.split(), strict=False)}
    return {
        "name": name, "kernel": kernel, "signature": pointers, "constexprs": constexprs or {},
        "num_warps": num_warps, "num_stages": 2, "dtype": dtype, **more,
    }  # fmt: skip


def compile_cases():
    halves, floats = "*fp16 *fp16 *fp16 i32 i32", "*fp32 *fp32 *fp32 i32"
    whole = {"name": "whole", "run": run_product, "floor": 2 * (2 * ROWS * COLUMNS + COLUMNS * COLUMNS)}
    thrice = {"name": "thrice", "run": run_scaled, "floor": 4 * (64 + 4 + 64)}
    few = {"maxnreg": 64, "waves_per_eu": 8}  # registers: the first is NVIDIA's option, the second AMD's
    return [
        _case("product", product, halves, {"TILE": TILE}, workloads=[whole]),
        _case("spilling", spilling, "*fp32 *fp32", {"SIZE": 4096}, num_warps=1, dtype="fp32", options=few),
        _case("no dots", scaled, "*fp16 *fp16 *fp16 i32"),
        _case(
            "rereading",
            scaled,
            floats,
            dtype="fp32",
            workloads=[thrice, {**thrice, "name": "allowed", "bound": "distinct"}],
        ),
        _case("wrong type", product, "*fp16 *fp32 *fp16 i32 i32", {"TILE": TILE}),
    ]


def llvm_waves(name):
    """The waves of a SIMD that the kernel's registers allow, which LLVM writes into its assembly; 8 at most."""
    code = compile_case(next(c for c in compile_cases() if c["name"] == name), "gfx942").asm["amdgcn"]
    return int(re.search(r"; Occupancy: (\d+)", code)[1])
