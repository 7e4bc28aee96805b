"""A catalog of millions on one machine: time and peak memory of every stage, and how the training step grows with the catalog.

    python -m benchmarks.at_scale stages [--preset amazon --preset tmall] [--work FOLDER]
    python -m benchmarks.at_scale steps

`stages` runs the commands as a user would, each in a process of its own, on simulated shops with the counts of the paper's Table 1:
CAFE `best` at d = 128, one epoch of training with validation and calibration, a sample of users ranked against the whole catalog.
Memory is the process's largest resident set; the target of training is 1.15 (table + two moments) + 1 GB.
`steps` trains on the same histories with their items folded into catalogs of several sizes, interleaved in one process. Waiting
is the share of the time in which the step's batch was not ready. One thread computes, the batches' thread is a second one.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import RESULTS, machine, read, write
from benchmarks.test_training import Trainer
from cafe.batches import prefetch
from cafe.config import Config
from cafe.data.dataset import Dataset, Sequences
from cafe.data.prepare import prepare
from cafe.data.simulate import PRESETS, simulate
from cafe.train import train_step

DIM, USERS = 128, 2_000
SIZES = (10_000, 100_000, 1_910_226)
WINDOW, WINDOWS = 16, 10  # steps
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(command: list[str]) -> dict[str, float]:
    """Seconds and peak bytes of a process, which must succeed."""
    print("$", "cafe", *command, flush=True)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "cafe.cli", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"it failed with status {status}")
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024}


@app.command()
def stages(
    preset: Annotated[list[str] | None, typer.Option()] = None,
    work: Path = Path("runs/scale"),
) -> None:
    """Time and peak memory of each command."""
    results: dict[str, Any] = {}
    for name in preset or ["amazon", "tmall"]:
        files, data, run = work / f"{name}-files", work / name, work / f"{name}-run"
        tables = 3 * 4 * DIM * (PRESETS[name].items + PRESETS[name].intents)
        limit = 1.15 * tables + 1e9
        commands = {
            "simulate": f"simulate --preset {name} --out {files}",
            "prepare": f"prepare --interactions {files}/interactions.parquet --items {files}/items.parquet --out {data}",
            "train": f"train --data {data} --model cafe --preset best --dim {DIM} --epochs 1 --out {run}",
            "evaluate": f"evaluate --run {run} --protocol full --max-users {USERS}",
            "recommend": f"recommend --run {run} --user u0 -k 10",
        }
        results[name] = {stage: measure(command.split()) for stage, command in commands.items()}
        results[name]["train"]["limit_bytes"] = limit
        print(f"\n{name:<12}{'seconds':>10}{'peak GB':>10}")
        for stage, found in results[name].items():
            print(f"{stage:<12}{found['seconds']:>10.1f}{found['peak_bytes'] / 1e9:>10.2f}")
        print(f"table and two moments: {tables / 1e9:.2f} GB; target for training: <= {limit / 1e9:.2f} GB\n")
    path = RESULTS / "at_scale_stages.json"
    former = read(path)["presets"] if path.exists() else {}  # of presets that were not measured now
    write("at_scale_stages", {"ours": [""], "dim": DIM, "evaluated_users": USERS, "presets": former | results})


def folded(dataset: Dataset, items: int) -> Dataset:
    """The same histories over the catalog's first `items` items."""
    sequences = Sequences(dataset.sequences.indptr, dataset.sequences.items % items)
    return replace(
        dataset, sequences=sequences, item_ids=dataset.item_ids[:items], item_intent=dataset.item_intent[:items]
    )


class Steps:
    """Training steps of one catalog."""

    def __init__(self, dataset: Dataset) -> None:
        config = Config.make("cafe", "best", dim=DIM)
        trainer = Trainer(config, dataset)
        self.model, self.optimizers, batches = trainer.model, trainer.optimizers, trainer.batches
        order = batches.order(0)
        rows = np.split(order, range(config.batch_size, len(order), config.batch_size))
        self.batches: Iterator[Any] = prefetch(lambda i: batches(rows[i], i), range(len(rows) - 1))
        self.waited: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited.append(time.perf_counter() - began)
        train_step(self.model, self.optimizers, batch)
        self.seconds.append(time.perf_counter() - began)


@app.command()
def steps(work: Path = Path("runs/scale")) -> None:
    """The step's time by the size of the catalog."""
    torch.set_num_threads(1)
    if not (work / "amazon").exists():
        files = simulate("amazon", work / "amazon-files")
        prepare(files["interactions"], files["items"]).save(work / "amazon")
    dataset = Dataset.load(work / "amazon")
    all_steps = {size: Steps(folded(dataset, size)) for size in SIZES}
    shuffle, sizes = np.random.default_rng(0), list(SIZES)
    for _ in range(WINDOWS + 1):
        shuffle.shuffle(sizes)
        for size in sizes:
            for _ in range(WINDOW):
                all_steps[size].step()
    record: dict[str, Any] = {
        "ours": [""],
        "threads": 1,
        "dim": DIM,
        "windows": WINDOWS,
        "steps_a_window": WINDOW,
        "sizes": {},
    }
    print(f"{'items':>12}{'ms a step':>12}{'x smallest':>12}{'waiting':>10}")
    base = statistics.median(all_steps[SIZES[0]].seconds[WINDOW:])
    for size, done in all_steps.items():
        median = statistics.median(done.seconds[WINDOW:])
        waiting = sum(done.waited[WINDOW:]) / sum(done.seconds[WINDOW:])
        record["sizes"][size] = {"median_seconds": median, "ratio_to_smallest": median / base, "share_waiting": waiting}
        print(f"{size:>12,}{1e3 * median:>12.2f}{median / base:>12.2f}{waiting:>10.1%}")
    print(f"targets: <= 1.3 times the smallest, < 2% waiting\n{machine()}\nwritten: {write('at_scale_steps', record)}")


if __name__ == "__main__":
    app()
