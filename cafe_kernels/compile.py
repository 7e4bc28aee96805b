"""Compiles every Triton kernel of the library for GPUs that need not be there, and reports what each one would use.

    python -m cafe_kernels.compile [--target sm_90 ...] [--json | --markdown]
    python -m cafe_kernels.compile --target sm_90 --out FOLDER     # keeps them, so that a GPU need not compile (cafe_kernels.stored)

A module of kernels lists its configurations in `compile_cases()`, dicts of
    name, kernel (JITFunction), signature (argument -> type), constexprs, num_warps, num_stages, dtype (fp32, fp16, bf16)
and, where they differ from the default,
    options: more of Triton's compile options, of which each vendor's compiler takes its own,
    matrix: whether tensor-core instructions are expected; by default for fp16 and bf16,
    workloads: small inputs to count bytes and FLOPs on, dicts of
        name, run (launches the kernel in this configuration under Triton's interpreter),
        floor: the bytes that no implementation of what the kernel computes can avoid; None for none,
        bound: which count of Traffic is held to BYTES_BOUND floors: "issued" (the default), or "distinct" where the kernel must
            read again.
A case is compiled by Triton's own launcher, short of the launch, so it is what a launch with such arguments asks for: pointers are
multiples of 16, since PyTorch aligns what it allocates, and numbers are nothing special (cafe_kernels.launched). LEGEND says how each
column is obtained.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cafe_kernels.stored import keep
from cafe_kernels.traffic import Traffic, count_traffic

MODULES = [  # every module of the library with compile_cases(), which a test checks
    "cafe_kernels.attention.triton_short",
    "cafe_kernels.attention.triton_long",
    "cafe_kernels.losses.triton_losses",
    "cafe_kernels.optim.triton_rows",
    "cafe_kernels.sampling.triton_sampler",
    "cafe_kernels.topk.triton_topk",
]
BYTES_BOUND = 1.1
REGISTERS_PER_LANE, REGISTER_GRANULE, SCHEDULERS, MAX_GROUPS = 512, 8, 4, 32  # a multiprocessor of any target below


@dataclass(frozen=True)
class Target:
    """What a multiprocessor holds. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the
    allocation units of CUDA's occupancy calculator; tensor memory: PTX ISA, tcgen05. AMD: CDNA 3 ISA guide and LLVM's
    AMDGPUBaseInfo (8 waves for each of 4 SIMDs, 64 KiB of LDS)."""

    backend: str
    arch: int | str
    warp_size: int
    max_warps: int
    shared_bytes: int
    shared_granule: int
    shared_reserved: int  # for each block, by the system
    tensor_columns: int = 0


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 164 * 1024, 128, 1024),
    "sm_90": Target("cuda", 90, 32, 64, 228 * 1024, 128, 1024),
    "sm_100": Target("cuda", 100, 32, 64, 228 * 1024, 128, 1024, 512),
    "gfx942": Target("hip", "gfx942", 64, 32, 64 * 1024, 512, 0),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers and local memory a thread, shared memory a block, instructions in its code."""

    registers: int
    spill_bytes: int
    scalar_spills: int  # AMD's scalar registers, kept in lanes of vector registers: no memory, yet instructions
    local_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix_instructions: int
    num_warps: int


@dataclass(frozen=True)
class Counted:
    """What a kernel moves on a workload, on any target."""

    workload: str
    traffic: Traffic
    floor: int | None
    bound: str


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one target. `resources` is None where it does not compile, and `error` says why."""

    name: str
    kernel: str  # module and function
    target: str
    dtype: str
    matrix_expected: bool
    resources: Resources | None
    error: str | None = None
    counted: tuple[Counted, ...] = ()


def occupancy(target: str, r: Resources) -> tuple[float, str]:
    """Resident warps as a share of the most that a multiprocessor holds, and what limits them."""
    t = TARGETS[target]
    blocks = {
        "warps": min(t.max_warps // r.num_warps, MAX_GROUPS),
        "registers": REGISTERS_PER_LANE // _up(max(r.registers, 1), REGISTER_GRANULE) * SCHEDULERS // r.num_warps,
        "shared memory": t.shared_bytes // max(_up(r.shared_bytes + t.shared_reserved, t.shared_granule), 1),
    }
    if r.tensor_columns:
        blocks["tensor memory"] = t.tensor_columns // r.tensor_columns
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * r.num_warps / t.max_warps, limit


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def violations(rows: Iterable[Row]) -> list[str]:
    """One line for each rule that a row breaks; empty when all is well."""
    found = []
    for row in rows:
        r = row.resources
        if r is None:
            broken = [f"does not compile: {row.error}"]
        else:
            broken = [
                message
                for failed, message in (
                    (r.spill_bytes, f"spills {r.spill_bytes} bytes"),
                    (r.scalar_spills, f"spills {r.scalar_spills} scalar registers"),
                    (r.local_bytes, f"uses {r.local_bytes} bytes of local memory"),
                    (occupancy(row.target, r)[0] == 0, f"cannot run: too much {occupancy(row.target, r)[1]}"),
                    (row.matrix_expected and not r.matrix_instructions, "has no tensor-core instruction"),
                )
                if failed
            ]
        found += [f"{row.name} on {row.target} {message}" for message in broken]
        for c in row.counted:
            if c.floor and (moved := getattr(c.traffic, c.bound)) > BYTES_BOUND * c.floor:
                found.append(
                    f"{row.name} moves {moved / c.floor:.2f} times the floor of {c.floor} bytes ({c.bound}) on {c.workload}"
                )
    return list(dict.fromkeys(found))


def report(
    targets: Iterable[str] = TARGETS, modules: Iterable[str] = MODULES, match: str = "", out: Path | None = None
) -> list[Row]:
    """Compiles the modules' cases for the targets, in one process for each CPU, and counts their traffic. match: a regular expression
    that is to be found in the names of the cases; by default in all. out: a folder to keep what was compiled in (cafe_kernels.stored);
    nothing is counted then."""
    targets, modules = list(targets), list(modules)
    if not modules:
        raise ValueError("no module lists Triton kernels to compile")
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"unknown target {', '.join(sorted(unknown))}: expected {', '.join(TARGETS)}")
    with _processes(interpret=True) as pool:
        cases = [
            (module, name)
            for module, names in zip(modules, pool.map(_names, modules), strict=True)
            for name in names
            if re.search(match, name)
        ]
        if not cases:
            raise ValueError(f"no case's name matches {match}")
        counted = [()] * len(cases) if out else list(pool.map(_count, cases))
    with _processes(interpret=False) as pool:
        rows = list(pool.map(_compile, [(*case, target, out) for case in cases for target in targets]))
    return [replace(row, counted=counted[i // len(targets)]) for i, row in enumerate(rows)]


@contextmanager
def _processes(interpret: bool) -> Iterator[ProcessPoolExecutor]:
    """New processes, because Triton looks at TRITON_INTERPRET when it is imported."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    try:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
            yield pool
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@cache
def _cases(module: str) -> dict[str, dict[str, Any]]:
    cases = importlib.import_module(module).compile_cases()
    named = {case["name"]: case for case in cases}
    if len(named) < len(cases) or not cases:
        raise ValueError(
            f"{module}.compile_cases() must give cases of different names, got {[c['name'] for c in cases]}"
        )
    return named


def _names(module: str) -> list[str]:
    return list(_cases(module))


def _count(which: tuple[str, str]) -> tuple[Counted, ...]:
    case = _cases(which[0])[which[1]]
    kernel, found = case["kernel"].fn.__name__, []
    for w in case.get("workloads", []):
        launched = count_traffic(w["run"])
        if kernel not in launched:
            raise ValueError(
                f"{': '.join(which)}: the workload {w['name']} must launch {kernel}, it launched {', '.join(launched) or 'nothing'}"
            )
        found.append(Counted(w["name"], launched[kernel], w["floor"], w.get("bound", "issued")))
    return tuple(found)


def _compile(which: tuple[str, str, str, Path | None]) -> Row:
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    module, name, target, out = which
    case = _cases(module)[name]
    matrix = case.get("matrix", case["dtype"] in ("fp16", "bf16"))
    resources, error = None, None
    knobs.cache.manager_class = FileCacheManager  # stored kernels lack what is read here
    try:
        compiled = compile_case(case, target)
    except Exception as e:  # a compiler's error may be of any class
        error = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1]}"
    else:
        resources = read_resources(compiled, target)
        if out:
            keep(compiled, out)
    return Row(
        name,
        f"{case['kernel'].fn.__module__}.{case['kernel'].fn.__name__}",
        target,
        case["dtype"],
        matrix,
        resources,
        error,
    )


def compile_case(case: dict[str, Any], target: str) -> Any:
    """Triton's CompiledKernel, as a launch with such arguments asks for it; from Triton's cache where it is there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    kernel, constexprs, t = case["kernel"], case["constexprs"], TARGETS[target]
    if missing := [n for n in kernel.arg_names if n not in case["signature"] and n not in constexprs]:
        raise ValueError(f"no type for the arguments {', '.join(missing)}")
    known = make_backend(GPUTarget(t.backend, t.arch, t.warp_size)).parse_options({}).__dict__
    options = {name: value for name, value in case.get("options", {}).items() if name in known}
    options |= {name: case[name] for name in ("num_warps", "num_stages")}
    arguments = [constexprs[n] if n in constexprs else _argument(case["signature"][n]) for n in kernel.arg_names]
    with offline(target):
        return kernel.warmup(*arguments, grid=(1,), **options)


@contextmanager
def offline(target: str) -> Iterator[None]:
    """Within it, Triton takes the target for the GPU of this machine, as far as compiling goes: `kernel.warmup` compiles for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    t = TARGETS[target]
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget(t.backend, t.arch, t.warp_size),
        get_current_device=lambda: target,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
    )
    before = driver._active
    driver.set_active(gpu)
    try:
        yield
    finally:
        driver._active = before


def _argument(kind: str) -> Any:
    """Something of this type: a tensor's type for a pointer, aligned as PyTorch's tensors are; a number that is nothing special."""
    import torch

    if kind.startswith("*"):
        number = {"i": "int", "u": "uint", "fp": "float", "bf": "bfloat"}[kind[1:].rstrip("0123456789")]
        return getattr(torch, number + kind.lstrip("*iufpb"))
    return 0.5 if kind.startswith("fp") else 2**40 + 3 if kind == "i64" else 3


def read_resources(compiled: Any, target: str) -> Resources:
    return (_read_cuda if TARGETS[target].backend == "cuda" else _read_hip)(compiled)


def _read_cuda(compiled: Any) -> Resources:
    from triton import knobs

    m = compiled.metadata
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        sass = _tool(knobs.nvidia.cuobjdump.path, "-sass", cubin)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=used["REG"],
        spill_bytes=_ptxas_spills(compiled) if used["STACK"] else 0,  # spilled registers live on the stack
        scalar_spills=0,
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=m.shared,
        tensor_columns=m.tmem_size or 0,
        matrix_instructions=len(re.findall(r"\s(?:[HIDQ]G?MMA|UTC\w*MMA)\b", sass)),
        num_warps=m.num_warps,
    )


def _ptxas_spills(compiled: Any) -> int:
    """Bytes that a thread stores and loads for spilled registers, as ptxas reports when it repeats Triton's last step."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    arch = compiled.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        log = _tool(get_ptxas(arch).path, *options, ptx, "-o", Path(folder, "kernel.cubin"))
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _tool(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr


def _read_hip(compiled: Any) -> Resources:
    code, m = compiled.asm["amdgcn"], compiled.metadata
    used = {name: int(value) for name, value in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", code, re.MULTILINE)}
    return Resources(
        registers=used["vgpr_count"],  # accumulation registers included: a wave has both from one file
        spill_bytes=4 * used["vgpr_spill_count"],
        scalar_spills=used["sgpr_spill_count"],
        local_bytes=used["private_segment_fixed_size"],
        shared_bytes=m.shared + used["group_segment_fixed_size"],
        tensor_columns=0,
        matrix_instructions=len(re.findall(r"^\s+v_s?mfma\w*", code, re.MULTILINE)),
        num_warps=m.num_warps,
    )


RESOURCES: dict[str, Callable[[Row, Resources], str]] = {
    "kernel": lambda row, r: row.name,
    "target": lambda row, r: row.target,
    "warps": lambda row, r: f"{r.num_warps}",
    "registers": lambda row, r: f"{r.registers}",
    "spill B": lambda row, r: f"{r.spill_bytes}" + (f" + {r.scalar_spills} scalar" if r.scalar_spills else ""),
    "local B": lambda row, r: f"{r.local_bytes}",
    "shared B": lambda row, r: f"{r.shared_bytes}",
    "occupancy": lambda row, r: "{:.0%} ({})".format(*occupancy(row.target, r)),
    "MMA": lambda row, r: f"{r.matrix_instructions}",
}
TRAFFIC: dict[str, Callable[[Counted], str]] = {
    "workload": lambda c: c.workload,
    "floor B": lambda c: f"{c.floor}" if c.floor else "-",
    "issued": lambda c: _ratio(c, c.traffic.issued),
    "distinct": lambda c: _ratio(c, c.traffic.distinct),
    "MFLOP": lambda c: f"{c.traffic.flops / 1e6:.2f}",
}
LEGEND = """\
Compiled, not run: nothing here was measured on a GPU. registers, spill B, local B: of a thread; shared B: of a block; occupancy:
resident warps as a share of the most possible, and what limits them; MMA: tensor-core instructions in the code. The rest is
counted by running the kernel on a small workload under Triton's interpreter, on any target the same. floor B: what must be read
or written once. issued and distinct: the bytes of the kernel's own loads and stores, in floors; issued counts an address once
for each load or store of a tile, distinct once a launch. MFLOP: 2 M N K of the tiles' matrix products, masked parts included."""


def _ratio(c: Counted, moved: int) -> str:
    return f"{moved / c.floor:.2f}" if c.floor else f"{moved} B"


def table(rows: Iterable[Row], markdown: bool = False) -> str:
    """A line for each row and workload; what a target's compiler made stands in the first of them."""
    lines = [[*RESOURCES, *TRAFFIC]]
    for row in rows:
        failed = [row.name, row.target, *["failed"] * (len(RESOURCES) - 2)]
        left = [cell(row, row.resources) for cell in RESOURCES.values()] if row.resources else failed
        for right in [[cell(c) for cell in TRAFFIC.values()] for c in row.counted] or [["-"] * len(TRAFFIC)]:
            lines.append(left + right)
            left = [row.name, row.target, *[""] * (len(RESOURCES) - 2)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        [x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in text)
    text.insert(1, ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in text)


def versions(targets: Iterable[str]) -> dict[str, str]:
    """Of what compiles and reads the kernels. RuntimeError names a tool that is missing."""
    import torch
    import triton

    cuda = any(TARGETS[target].backend == "cuda" for target in targets)
    tools = ["ptxas", "ptxas_blackwell", "cuobjdump"] if cuda else []
    found = {name: getattr(triton.knobs.nvidia, name).version for name in tools}
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cafe_kernels.compile",
        description="Compile every Triton kernel for GPUs that need not be there, and print what each would use.",
        epilog="example: python -m cafe_kernels.compile --target sm_90 --target gfx942",
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; default: all")
    parser.add_argument(
        "--module", action="append", help="a module with compile_cases(); may be repeated; default: all"
    )
    parser.add_argument("--match", default="", help="a regular expression for the names of the cases; default: all")
    parser.add_argument(
        "--out", type=Path, help="keep the compiled kernels in this folder, and report no more than faults"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print rows, violations and versions as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    given = parser.parse_args(arguments)
    if given.out:
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {given.out}: {error.strerror}; give a folder, or the name of one that can be made")
    try:
        used = versions(given.target or TARGETS)
        rows = report(given.target or TARGETS, given.module or MODULES, given.match, given.out)
    except (ImportError, AttributeError, RuntimeError, ValueError, OSError, re.error) as error:
        print(f"cannot compile the kernels: {error}", file=sys.stderr)
        return 2
    broken = violations(rows)
    if given.json:
        print(json.dumps({"versions": used, "violations": broken, "rows": [_record(row) for row in rows]}, indent=1))
        return bool(broken)
    if given.out:
        print(
            f"{sum(row.resources is not None for row in rows)} kernels for {', '.join(given.target or TARGETS)} in {given.out}"
        )
    else:
        print(table(rows, given.markdown), LEGEND, ", ".join(f"{k} {v}" for k, v in used.items()), sep="\n\n")
    if broken:
        print("\nViolations:", *broken, sep="\n", file=sys.stderr)
    return bool(broken)


def _record(row: Row) -> dict[str, Any]:
    share, limit = occupancy(row.target, row.resources) if row.resources else (None, None)
    return {**asdict(row), "occupancy": share, "occupancy_limit": limit}


if __name__ == "__main__":
    sys.exit(main())
