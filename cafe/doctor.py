"""What works here and what does not: `cafe doctor`, whose output belongs into a bug report.

It reports versions, the CPU and which of its instructions are used, the C++ extension, the GPUs, kernels that were compiled beforehand, and
for every op which backends can run, tested there on a small case against the plain reference. Needs torch and numpy alone, so that
`python -m cafe.doctor` can tell of what is missing.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PACKAGES = {  # what they are needed for
    "torch": "everything",
    "numpy": "everything",
    "triton": "GPUs",
    "polars": "the cafe command",
    "typer": "the cafe command",
    "rich": "the cafe command",
    "matplotlib": "plots",
    "safetensors": "training",
    "scikit-learn": "the t-SNE of cafe report",
    "pandas": "cafe.adapter",
    "onnx": "cafe export",
    "onnxscript": "cafe export",
    "onnxruntime": "cafe export",
    "torchrec": "more than one machine",
    "fbgemm-gpu-cpu": "more than one machine",
}
VARIABLES = (
    "CAFE_KERNELS_BACKEND", "CAFE_KERNELS_ISA", "CAFE_KERNELS_STORE", "TRITON_INTERPRET", "TRITON_CACHE_DIR",
    "TRITON_CACHE_MANAGER", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
COMPILED_FOR = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}  # what `make gate` judges
TOLERANCE = 1e-4  # of the largest number of the reference: float32, a few hundred terms


def examine() -> dict[str, Any]:
    """All findings, fit for JSON. `problems` lists what does not work, one line each; empty when all is well."""
    found: dict[str, Any] = {
        "versions": {"cafe-kernels": version("cafe-kernels"), "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "system": {
            "platform": platform.platform(),
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    problems = found["problems"] = []
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: it lacks a shared library
        problems.append(f"torch cannot be imported ({error}): pip install torch")
        return found
    found["gpus"] = _gpus(torch)
    if found["gpus"]:
        found["system"] |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "driver": _driver()}
    try:
        extension = importlib.import_module("cafe_kernels._C")
    except (ImportError, OSError) as error:
        found["extension"] = {"error": str(error)}
        problems.append(
            f"the C++ extension cannot be imported ({error}): install again with a C++ compiler, pip install -v ."
        )
        return found
    found["extension"] = {"file": extension.__file__, "instructions": _instructions(extension)}
    from cafe_kernels import stored
    from cafe_kernels.backends import BACKENDS

    named = os.environ.get("CAFE_KERNELS_BACKEND")
    if named and named not in BACKENDS:
        problems.append(f"CAFE_KERNELS_BACKEND={named} is no backend: expected {', '.join(BACKENDS)}")
    kept = stored.folder()
    if os.environ.get("CAFE_KERNELS_STORE") and not kept.is_dir():
        problems.append(f"CAFE_KERNELS_STORE={kept} is not a folder: kernels will be compiled")
    targets, strange = _stored_targets(kept)
    found["compiled kernels"] = {"folder": str(kept), "targets": targets}
    problems += [f"{file} does not describe a compiled kernel: delete {file.parent}" for file in strange]
    found["ops"] = [_test(op, backend) for op in OPS for backend in ("cpu", "triton")]
    for row in found["ops"]:
        if row["status"] == "wrong":
            problems.append(f"{row['op']} on {row['backend']} differs from the reference by {row['error']:.1e}")
        if row["status"] == "failed":
            problems.append(f"{row['op']} on {row['backend']} failed: {row['why']}")
        if row["status"] == "unusable" and row["backend"] == "triton" and found["gpus"]:
            problems.append(f"{row['op']} does not use the GPU: {row['why']}")
    return found


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or "unknown"


def _instructions(extension: Any) -> list[str]:
    """The code paths that this CPU can run, the fastest last: asking for one that it lacks is a ValueError."""
    able = []
    for isa in ("portable", "avx2", "avx512"):
        try:
            extension.philox_bits(0, 0, 0, 0, 1, isa)
        except ValueError:
            continue
        able.append(isa)
    return able


def _gpus(torch: Any) -> list[dict[str, Any]]:
    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        hip = torch.version.hip is not None
        arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
        judged = arch == "gfx942" if hip else (properties.major, properties.minor) in COMPILED_FOR
        gpus.append(
            {
                "name": properties.name,
                "architecture": arch,
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "kernels_judged_for_it": judged,
            }
        )
    return gpus


def _driver() -> str | None:
    """NVIDIA's or AMD's, as the Linux kernel tells."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(file).exists() and (line := Path(file).read_text().partition("\n")[0]):
            return line
    return None


def _stored_targets(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """How many kernels were compiled beforehand for each GPU, and files of something else."""
    counts: dict[str, int] = {}
    strange = []
    for file in sorted(folder.glob("*/*.json")):
        try:
            arch = json.loads(file.read_text())["target"]["arch"]
        except (OSError, ValueError, LookupError, TypeError):
            strange.append(file)
            continue
        name = f"sm_{arch}" if isinstance(arch, int) else str(arch)
        counts[name] = counts.get(name, 0) + 1
    return counts, strange


def _attention(backend: str, device: str, causal: bool = True) -> list[Any]:
    import torch

    from cafe_kernels import distance_attention

    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(90, 2, 16, generator=make).to(device).requires_grad_() for _ in range(3))
    theta = torch.randn(2, 70 if causal else 139, generator=make).to(device).requires_grad_()
    starts = torch.tensor([0, 1, 20, 90], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"max_seqlen": 70, "dropout_p": 0.2, "seed": 1, "causal": causal}
    out = distance_attention(q, k, v, theta, starts, backend=backend, **options)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, theta))]


def _loss(backend: str, device: str, name: str, negatives_shape: tuple[int, ...]) -> list[Any]:
    import torch

    import cafe_kernels

    make = torch.Generator().manual_seed(0)
    h = torch.randn(30, 16, generator=make).to(device).requires_grad_()
    table = torch.randn(50, 16, generator=make).to(device).requires_grad_()
    positives, negatives = (torch.randint(50, shape, generator=make).to(device) for shape in ((30,), negatives_shape))
    loss = getattr(cafe_kernels, name)(h, table, positives, negatives, backend=backend)
    return [loss, *torch.autograd.grad(loss, (h, table))]


def _optimizer(backend: str, device: str) -> list[Any]:
    import torch

    from cafe_kernels import RowSparseAdam

    make = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(torch.randn(40, 16, generator=make).to(device))
    optimizer = RowSparseAdam([table], lr=0.1, mode="exact", backend=backend)
    for _ in range(3):
        rows, values = torch.randint(40, (20,), generator=make), torch.randn(20, 16, generator=make)
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape).to(device)
        optimizer.step()
    optimizer.flush()
    return [table]


def _sampler(backend: str, device: str) -> list[Any]:
    import torch

    from cafe_kernels.sampling import AliasSampler, DeviceSampler

    sampler = DeviceSampler(AliasSampler([1, 2, 3, 4, 5]), device, backend)
    indptr, rows = (torch.tensor(x, device=device) for x in ([0, 2, 3], [0, 1, 0]))
    indices = torch.tensor([1, 4, 0], dtype=torch.int32, device=device)
    return [sampler.sample(100, seed=0).float(), sampler.sample_excluding(indptr, indices, rows, 20, seed=1).float()]


def _topk(backend: str, device: str) -> list[Any]:
    from cafe_kernels import TopKIndex

    user, table, intent, scores = _catalog(device)
    found = TopKIndex(table, intent, 4, backend=backend).search(user, 10, scores, join="log_sigmoid")
    return [found.items.float(), found.scores]


def _joint_topk(backend: str, device: str) -> list[Any]:
    import torch

    from cafe_kernels import joint_topk

    user, table, _, scores = _catalog(device)
    found = joint_topk(user, table, scores, torch.tensor([0, 50, 100, 200, 300], device=device), 10, backend=backend)
    return [found.items.float(), found.scores]


def _topk_inner_product(backend: str, device: str) -> list[Any]:
    from cafe_kernels import topk_inner_product

    user, table, *_ = _catalog(device)
    found = topk_inner_product(user, table, 10, backend=backend)
    return [found.items.float(), found.scores]


def _catalog(device: str) -> list[Any]:
    """5 users, 300 items, the intent of each, 4 intents' scores for each user."""
    import torch

    make = torch.Generator().manual_seed(0)
    table, user, scores = (torch.randn(n, d, generator=make) for n, d in ((300, 16), (5, 16), (5, 4)))
    return [x.to(device) for x in (user, table, torch.randint(4, (300,), generator=make), scores)]


OPS: dict[str, Callable[[str, str], list[Any]]] = {
    "distance_attention": _attention,
    "distance_attention, two-sided": partial(_attention, causal=False),
    "sampled_softmax": partial(_loss, name="sampled_softmax", negatives_shape=(40,)),
    "sampled_bce": partial(_loss, name="sampled_bce", negatives_shape=(30, 8)),
    "gbce": partial(_loss, name="gbce", negatives_shape=(30, 8)),
    "RowSparseAdam": _optimizer,
    "AliasSampler": _sampler,
    "TopKIndex": _topk,
    "joint_topk": _joint_topk,
    "topk_inner_product": _topk_inner_product,
}


def _test(op: str, backend: str) -> dict[str, Any]:
    """One row: `status` is ok, wrong (off the reference), unusable (as expected here: `why`) or failed."""
    import torch

    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    run, row = OPS[op], {"op": op, "backend": backend, "device": device}
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, expected = run(backend, device), run("reference", device)
    except ValueError as error:
        usable = "cannot run" not in str(error)
        return row | {"status": "failed" if usable else "unusable", "why": str(error)}
    except Exception as error:  # the compiler's and the driver's may be of any class
        return row | {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds = time.perf_counter() - began
    errors = [
        float((x.detach() - y.detach()).abs().max() / y.detach().abs().max().clamp(min=1e-30))
        for x, y in zip(got, expected, strict=True)
    ]
    right = all(error <= TOLERANCE for error in errors)
    return row | {"status": "ok" if right else "wrong", "error": max(errors), "seconds": round(seconds, 3)}


def text(found: dict[str, Any]) -> str:
    """The findings for people."""
    lines = []
    for name, value in found["versions"].items():
        lines.append(
            f"{name:<16}{value or f'not installed: needed for {PACKAGES[name]}' if name in PACKAGES else value}"
        )
    lines += ["", *(f"{name:<16}{value}" for name, value in found["system"].items() if value)]
    lines += [f"{name}={value}" for name, value in found["environment"].items()]
    for gpu in found.get("gpus", []):
        judged = "" if gpu["kernels_judged_for_it"] else ", for which no kernel was judged: it may spill registers"
        lines.append(f"{'gpu':<16}{gpu['name']}, {gpu['architecture']}, {gpu['memory_gb']} GB{judged}")
    if found.get("gpus") == []:
        lines.append(f"{'gpu':<16}none that this torch sees")
    if extension := found.get("extension"):
        lines.append(f"{'extension':<16}{extension.get('file') or extension['error']}")
        if "instructions" in extension:
            lines.append(f"{'instructions':<16}{', '.join(extension['instructions'])}")
    if kept := found.get("compiled kernels"):
        stored = ", ".join(f"{count} for {name}" for name, count in kept["targets"].items())
        lines.append(
            f"{'compiled':<16}{stored or 'no kernel beforehand: the first launches compile'} ({kept['folder']})"
        )
    lines.append("")
    for row in found.get("ops", []):
        detail = row.get("why") or f"{row['error']:.1e} off the reference, {row['seconds']} s on {row['device']}"
        lines.append(f"{row['op']:<31}{row['backend']:<8}{row['status']:<10}{detail}")
    lines += ["", *(found["problems"] or ["no problem found"])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given not in ([], ["--json"]):
        print("usage: python -m cafe.doctor [--json]", file=sys.stderr)
        return 2
    found = examine()
    print(json.dumps(found, indent=2) if given else text(found))
    return bool(found["problems"])


if __name__ == "__main__":
    sys.exit(main())
