"""Trains in one process for long and checks that memory and speed stay as they are.

    python -m tests.soak --minutes 60

CAFE `best` on the simulated shop `demo`, with validation, a checkpoint and new metrics after every epoch, as `cafe train` does. Each
minute prints the resident memory and the tokens trained: a second, and a second of this process's CPU time, which other processes on the
machine disturb less. After the first quarter, in which caches fill, the medians of the first and the last third of what is left are
compared: memory may grow by GROWTH, and the tokens per CPU second may fall by SLOWDOWN, which is beyond the noise between minutes.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from cafe.config import Config
from cafe.data.prepare import prepare
from cafe.data.simulate import simulate
from cafe.train import fit

GROWTH = 8.0  # MiB
SLOWDOWN = 0.15


class TimeIsUp(Exception):
    """Ends the training."""


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def verdict(memory: list[float], speed: list[float]) -> list[str]:
    """What is wrong with these numbers, one a minute.

    >>> verdict([100.0] * 12, [50.0] * 12)
    []
    >>> verdict([100.0 + minute for minute in range(30)], [50.0] * 20 + [30.0] * 10)
    ['memory grew by 16.0 MiB', 'speed fell by 40%']
    """
    settled = len(memory) // 4
    third = max(1, (len(memory) - settled) // 3)
    (before, after), (fast, slow) = (
        (statistics.median(x[settled : settled + third]), statistics.median(x[-third:])) for x in (memory, speed)
    )
    wrong = [f"memory grew by {after - before:.1f} MiB"] if after - before > GROWTH else []
    return wrong + ([f"speed fell by {1 - slow / fast:.0%}"] if slow < (1 - SLOWDOWN) * fast else [])


def soak(minutes: int, folder: Path) -> list[str]:
    """Trains for so many minutes; returns what is wrong."""
    files = simulate("demo", folder / "shop")
    dataset = prepare(files["interactions"], files["items"], folder / "data")
    config = Config.make("cafe", "best", epochs=1_000_000, patience=1_000_000, valid_users=500)
    memory: list[float] = []
    speed: list[float] = []
    tokens, wall, cpu = 0, time.monotonic(), time.process_time()

    def progress(event: dict) -> None:
        nonlocal tokens, wall, cpu
        tokens += event.get("tokens", 0)
        passed = time.monotonic() - wall
        if passed < 60:
            return
        memory.append(resident())
        speed.append(tokens / (time.process_time() - cpu))
        print(
            f"minute {len(memory):4}  step {event['step']:8}  {memory[-1]:8.1f} MiB  {tokens / passed:8,.0f} tokens/s  "
            f"{speed[-1]:8,.0f} tokens a CPU second",
            flush=True,
        )
        if len(memory) == minutes:
            raise TimeIsUp
        tokens, wall, cpu = 0, time.monotonic(), time.process_time()

    with contextlib.suppress(TimeIsUp):
        fit(config, dataset, folder / "run", data=folder / "data", progress=progress)
    return verdict(memory, speed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(options.minutes, Path(folder))
    print("; ".join(found) or "memory and speed are steady")
    sys.exit(bool(found))
