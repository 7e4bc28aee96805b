"""What every benchmark shares: contestants timed interleaved in one run, medians, a table of ratios, a JSON record."""

import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cafe.doctor import processor

VERSION = 2  # of the results' format, see `write`
RESULTS = Path(os.environ.get("CAFE_RESULTS", Path(__file__).parent / "results"))
Medians = dict[str, float]  # seconds a call of each contestant
Spread = dict[str, list[float]]  # the first and third quartile of the same


def keep_memory() -> None:
    """Freed memory stays with the process: without it glibc returns every large tensor to the system, and a benchmark of kernels
    measures page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def compare(
    contestants: dict[str, Callable[[Any], Any]], prepare: Callable[[int], Any], seconds: float = 15, rounds: int = 200
) -> tuple[Medians, Medians, Spread]:
    """Median seconds a call of each contestant, when it goes on calling and when it comes after another one; and the first's quartiles.

    Every round gives each contestant three calls, in a new random order of contestants. The first finds the caches as
    another one left them, which counts as `after`; the other two count as `steady`. Each call is on a fresh
    `prepare(number)`, which is not timed. Stops after `rounds` rounds, or after `seconds` once there are 5."""
    after: dict[str, list[float]] = {name: [] for name in contestants}
    steady: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle, number, start = list(contestants), np.random.default_rng(0), 0, time.perf_counter()
    for r in range(rounds):
        if r >= 5 and time.perf_counter() - start > seconds:
            break
        shuffle.shuffle(order)
        for name in order:
            for times in (after, steady, steady):
                given = prepare(number)
                number += 1
                began = time.perf_counter()
                contestants[name](given)
                times[name].append(time.perf_counter() - began)
    medians = [{name: statistics.median(t) for name, t in times.items()} for times in (steady, after)]
    return medians[0], medians[1], {name: quartiles(t) for name, t in steady.items()}


def quartiles(values: list[float]) -> list[float]:
    return np.quantile(values, [0.25, 0.75]).tolist()


def table(title: str, steady: dict[str, float], after: dict[str, float], ours: str) -> str:
    """One line a contestant: its medians, and how many times as long as `ours` it took."""
    width = max(map(len, steady))
    lines = [f"{title:<{width}}  {'steady':>16}{'x ours':>9}  {'after another':>16}{'x ours':>9}"]
    for name in steady:
        cells = [f"{t[name] * 1e6:>13.1f} us{t[name] / t[ours]:>9.2f}" for t in (steady, after)]
        lines.append(f"{name:<{width}}  {'  '.join(cells)}")
    return "\n".join(["", *lines])


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was: the load averages of 1, 5 and 15 minutes at the end of the measurement."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()),
    }


def versions(*packages: str) -> dict[str, str]:
    """Of Python, numpy, torch and `packages`."""
    given = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__, **given}


def write(name: str, record: dict[str, Any], folder: Path = RESULTS, packages: Sequence[str] = ()) -> Path:
    """`folder`/`name`.json: the format's version, the machine, the versions (also of `packages`) and `record`. A run that is cut off
    leaves the former file whole.

    What `benchmarks.regressions` compares are all {"median_seconds": {contestant: seconds}, "quartiles": {contestant: [first, third]}}
    in `record`, wherever they are; record["ours"] says how the names of the contestants that are this library's begin."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".tmp")
    head = {"version": VERSION, "machine": machine(), "versions": versions(*packages)}
    unfinished.write_text(json.dumps({**head, **record}, indent=2) + "\n")
    unfinished.replace(path)
    return path


def busy(record: dict[str, Any]) -> str | None:
    """How busy the machine was while `record` was measured, if there were more running processes than cores."""
    machine = record.get("machine") or {}
    load, cores = machine.get("load_average"), machine.get("cores")
    return f"load average {load[1]:.1f} on {cores} cores" if load and cores and load[1] > cores else None


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no results file, or one of another version.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or measure again") from None
    found = record.get("version") if isinstance(record, dict) else None
    if found != VERSION:
        raise ValueError(f"{path} has results of version {found}, expected {VERSION}: measure again")
    return record


@contextmanager
def recording(name: str, config: Any, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within it, tests run on record["threads"] threads; at its end the record is written, and the machine printed past pytest's
    capture. A run of some cases (-k) replaces those only: fields of `record` that are empty start as they were written last.
    `config` is the fixture pytestconfig."""
    path = RESULTS / f"{name}.json"
    former = read(path) if path.exists() else {}
    record |= {key: former.get(key, value) for key, value in record.items() if value == {}}
    before = torch.get_num_threads()
    torch.set_num_threads(record["threads"])
    yield record
    torch.set_num_threads(before)
    write(name, record)
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{machine()}, threads: {record['threads']}\nwritten: {path}")


def find_data(name: str, given: str | None = None) -> Path | None:
    """The folder of a real data set: `given`, or shared/data/`name` beside this repository or further up; None if there is none."""
    if given is not None:
        return Path(given)
    found = (parent / "shared" / "data" / name for parent in Path(__file__).resolve().parents)
    return next((folder for folder in found if folder.exists()), None)
