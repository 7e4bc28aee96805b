"""Quality against time: SASRec as other libraries train it, and this one's models, on the same histories, side by side.

    python -m benchmarks.peers.end_to_end                     # beauty-sparse, every contestant: about 20 minutes of CPU
    python -m benchmarks.peers.end_to_end --data FOLDER --only "RecTools, softmax" --only "SASRec best" --epochs 2 --out /tmp/try.json
    python -m benchmarks.peers.end_to_end --summary           # prints and draws what was recorded last

Everybody trains on what `cafe prepare`'s split leaves for training (each history without its last two items), with d = 64, n = 50, 2
blocks, 1 head, 128 sequences a step, Adam at 1e-3, one thread, each in a process and an environment of its own (env.py), at its own
library's defaults otherwise. The next turn, an epoch (two for ours, which are short), is always that of the one with the fewest CPU seconds
so far: whatever else the machine does slows all alike, and a run that is cut off has given everybody as much. After its turn a contestant
hands over every user's ten best items without the history, and `ndcg_at_10` makes NDCG@10 of the validation answers of it, the
same for all: cafe's `full` protocol. Time is that of training, batches and negatives included, ranking left out; CAFE `best` also
pays for fitting its joint score's two weights, which it does on the validation answers of 500 users, as `cafe train` does on more: every
eighth turn, and the time of one fit is part of each of its times. CPU seconds are the whole
process's and hardly depend on what else runs; wall seconds do. Who gets no better for `patience` turns, or has used up its budget
of CPU seconds, is done. Memory is the largest resident set while training, and beyond that after the libraries and data were loaded.

"Final" is the best value of a contestant's curve, and the time to reach a value is that of the first epoch that has it. The summary has
the time of each of RecTools' contestants to its own final value over that of each of ours to the same value.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, find_data, read, write
from benchmarks.peers import env
from cafe.data.prepare import prepare

COMMON = {"dim": 64, "max_len": 50, "layers": 2, "heads": 1, "dropout": 0.3, "batch_size": 128, "lr": 1e-3}
NEGATIVES = 128
OURS = "cafe: "
THEIRS = "RecTools"


def rectools(loss: str, negatives: int | None = None, **more: Any) -> dict[str, Any]:
    return {"environment": "rectools", "module": "with_rectools", "loss": loss, "negatives": negatives, **more}


def recbole(loss: str) -> dict[str, Any]:
    return {"environment": "recbole", "module": "with_recbole", "loss": loss}


def cafe(model: str, preset: str, padded: bool = False, **options: Any) -> dict[str, Any]:
    """`dropout` is everybody's but in `best`, which has its own."""
    given = {name: COMMON[name] for name in COMMON if preset == "paper" or name in ("dim", "batch_size")}
    turn = 1 if padded else 2
    return {
        "module": "with_cafe", "model": model, "preset": preset, "padded": padded, "options": given | options, "epochs_a_turn": turn
    }  # fmt: skip


CONTESTANTS = {
    "RecTools, softmax": rectools("softmax", budget_times=4),  # its epochs are the longest
    "RecTools, sampled softmax of 128": rectools("sampled_softmax", NEGATIVES),
    "RecTools, BCE": rectools("BCE", 1),
    "RecTools, gBCE of 128": rectools("gBCE", NEGATIVES),
    "RecBole, softmax": recbole("CE"),
    "padded PyTorch, BCE": cafe("sasrec", "paper", padded=True),
    f"{OURS}SASRec paper, BCE": cafe("sasrec", "paper"),
    f"{OURS}SASRec, softmax": cafe("sasrec", "paper", loss="full"),
    f"{OURS}SASRec, sampled softmax of 128": cafe("sasrec", "paper", loss="softmax", negatives=NEGATIVES),
    f"{OURS}SASRec best": cafe("sasrec", "best"),
    f"{OURS}CAFE paper": cafe("cafe", "paper"),
    f"{OURS}CAFE best": cafe("cafe", "best"),
}
Curve = list[dict[str, float]]  # one entry a turn: epoch, ndcg@10, cpu_seconds, wall_seconds, peak_bytes, ...


def ndcg_at_10(top: np.ndarray, answers: np.ndarray) -> float:
    """Mean over users; top: int (users, 10), best first; answers: int (users,).

    >>> ndcg_at_10(np.array([[3, 5], [1, 2]]), np.array([5, 7])).round(4)  # second, and not there
    np.float64(0.3155)
    """
    hit = top == answers[:, None]
    return (hit / np.log2(np.arange(2, top.shape[1] + 2))).sum(1).mean()


def seconds_to(curve: Curve, value: float, clock: str = "cpu_seconds") -> float | None:
    """Seconds of training after the first epoch with at least this NDCG@10; None where there is none."""
    return next((epoch[clock] for epoch in curve if epoch["ndcg@10"] >= value), None)


def final(curve: Curve) -> float:
    return max(epoch["ndcg@10"] for epoch in curve)


def measured(curve: Curve) -> bool:
    return bool(curve) and all(math.isfinite(value) for line in curve for value in line.values())


def waited(curve: Curve) -> int:
    """Turns since the best one."""
    return len(curve) - 1 - int(np.argmax([line["ndcg@10"] for line in curve]))


def times_shorter(curves: dict[str, Curve]) -> dict[str, dict[str, float]]:
    """Of each of ours, for each of RecTools' contestants: its seconds to its final value over ours to the same one; 0 where ours
    never had it."""

    def ratio(ours: Curve, theirs: Curve) -> float:
        reached, base = (seconds_to(curve, final(theirs)) for curve in (ours, theirs))
        return 0.0 if reached is None or base is None else base / reached

    ours, theirs = (
        {name: curve for name, curve in curves.items() if measured(curve) and name.startswith(who)}
        for who in (OURS, THEIRS)
    )
    return {name: {peer: ratio(ours[name], theirs[peer]) for peer in theirs} for name in ours}


def least_favourable(curves: dict[str, Curve]) -> tuple[float, str, str] | None:
    """The ratio of ours that does best against the peer it does worst against, and the names of both."""
    worst = []
    for name, ratios in times_shorter(curves).items():
        if ratios:
            peer = min(ratios, key=ratios.__getitem__)
            worst.append((ratios[peer], name, peer))
    return max(worst, default=None)


def prepare_data(name: str, work: Path) -> tuple[Path, np.ndarray]:
    """Writes data.npz (see contestant.Data) and the prepared dataset to `work`; returns the file and the answers, which are not in it."""
    folder = Path(name) if Path(name).is_dir() else find_data(name)
    if folder is None:
        raise SystemExit(f"no data set {name}: give its folder, with interactions.csv.gz and items.csv.gz, by --data")
    dataset = prepare(folder / "interactions.csv.gz", folder / "items.csv.gz", work / "dataset")
    train, holdout = dataset.train(), dataset.holdout("valid")
    seen = [np.setdiff1d(history, answer) for history, answer in zip(holdout.histories, holdout.answers, strict=True)]
    arrays = {
        "num_items": dataset.num_items,
        "users": holdout.users,
        "indptr": train.indptr,
        "items": train.items,
        "excluded_indptr": np.cumsum([0, *map(len, seen)]),
        "excluded": np.concatenate(seen).astype(np.int64),
    }
    np.savez(work / "data.npz", **arrays)
    return work / "data.npz", holdout.answers


class Process:
    """A contestant that runs, and its curve so far."""

    def __init__(self, name: str, settings: dict[str, Any], work: Path, data: Path, answers: np.ndarray) -> None:
        self.name, self.answers, self.curve = name, answers, []
        self.budget_times = settings.get("budget_times", 1)
        self.top = work / f"{len(list(work.iterdir()))}.npy"
        where = settings.get("environment")
        python = env.python_of(where) if where else Path(sys.executable)
        settings = settings | {"dataset": str(work / "dataset")}
        command = [python, "-m", f"benchmarks.peers.{settings['module']}", json.dumps(settings), data, self.top]
        self.log = work / f"{self.top.stem}.log"
        self.process = subprocess.Popen(
            command,
            cwd=env.ROOT,
            env=env.environment(settings["threads"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.versions = self._hear()["versions"]

    @property
    def spent(self) -> float:
        return self.curve[-1]["cpu_seconds"] if self.curve else 0.0

    def turn(self) -> dict[str, float]:
        """Lets it train an epoch, or two."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self._hear()
        line["ndcg@10"] = float(ndcg_at_10(np.load(self.top), self.answers))
        self.curve.append(line)
        return line

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def going(self, epochs: int, patience: int, budget: float) -> bool:
        budget *= self.budget_times
        return self.curve[-1]["epoch"] < epochs and waited(self.curve) < patience and self.spent < budget


def run(
    names: Sequence[str], data: str, epochs: int, patience: int, budget: float, threads: int, seed: int, out: Path
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        path, answers = prepare_data(data, work)
        record: dict[str, Any] = {
            "data": Path(data).name,
            "threads": threads,
            "seed": seed,
            "users": len(answers),
            "common": COMMON,
            "patience": patience,
            "budget_cpu_seconds": budget,
            "load_average_at_start": os.getloadavg(),
            "libraries": {},
            "settings": {name: CONTESTANTS[name] for name in names},
            "curves": {},
        }
        running: list[Process] = []
        try:
            for name in names:
                settings = COMMON | CONTESTANTS[name] | {"threads": threads, "seed": seed}
                running.append(Process(name, settings, work, path, answers))
                record["libraries"][name] = running[-1].versions
                record["curves"][name] = running[-1].curve
            going = list(running)
            while going:
                contestant = min(going, key=lambda one: one.spent)
                line = contestant.turn()
                print(
                    f"{contestant.name:<36} epoch {line['epoch']:>3}  ndcg@10 {line['ndcg@10']:.4f}"
                    f"  cpu {line['cpu_seconds']:8.2f} s  wall {line['wall_seconds']:8.2f} s",
                    flush=True,
                )
                if not contestant.going(epochs, patience, budget):
                    contestant.stop()
                    going.remove(contestant)
                write(out.stem, record, out.parent)
        finally:
            for contestant in running:
                contestant.stop()
    return record


def summary(record: dict[str, Any]) -> str:
    """Two Markdown tables: what each contestant reached, and how much longer each of RecTools' took to its best value than ours to the
    same. A + says that a contestant ended by the budget or a cut, and might have got better."""
    curves: dict[str, Curve] = record["curves"]
    plus = {
        name: "+" if measured(curve) and waited(curve) < record["patience"] else "" for name, curve in curves.items()
    }
    lines = [
        "| contestant | epochs | best NDCG@10 | CPU s to it | CPU s an epoch | memory, MB (beyond start) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, curve in curves.items():
        if not measured(curve):
            lines.append(f"| {name} | not measured |")
            continue
        best, epochs = final(curve), curve[-1]["epoch"]
        peaks = [max(epoch[key] for epoch in curve) / 1e6 for key in ("peak_bytes", "peak_beyond_start_bytes")]
        lines.append(
            f"| {name} | {epochs}{plus[name]} | {best:.4f} | {seconds_to(curve, best):.1f} "
            f"| {curve[-1]['cpu_seconds'] / epochs:.2f} | {peaks[0]:.0f} ({peaks[1]:.0f}) |"
        )
    found, least = times_shorter(curves), least_favourable(curves)
    if least is None:
        return "\n".join(lines)
    peers = list(found[least[1]])
    lines += [
        "",
        f"CPU seconds of each of {THEIRS}' contestants to its own best value, over ours to the same value:",
        "",
        f"| times shorter | {' | '.join(peer + plus[peer] for peer in peers)} |",
        f"|---|{'--:|' * len(peers)}",
    ]
    lines += [
        f"| {name} | {' | '.join(f'{ratios[peer]:.1f}' if ratios[peer] else 'never' for peer in peers)} |"
        for name, ratios in found.items()
    ]
    cut = "; ".join(peer for peer in peers if plus[peer])
    lines += ["", f"+: ended by the budget, not for want of a better value: {cut or 'none'}.", ""]
    lines += [f"The least favourable: {least[0]:.1f} times, {least[1]} against {least[2]}."]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for name, curve in record["curves"].items():
        style = "-" if name.startswith(OURS) else "--"
        axes.plot([e["cpu_seconds"] for e in curve], [e["ndcg@10"] for e in curve], style, marker=".", label=name)
    axes.set(xscale="log", xlabel="CPU seconds of training", ylabel="validation NDCG@10, whole catalog")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_title(f"{record['data']}, one process and {record['threads']} thread each")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="beauty-sparse", help="a name in shared/data, or a folder")
    parser.add_argument("--only", action="append", choices=CONTESTANTS, help="this contestant (repeat for more)")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=8, help="turns without a better one")
    parser.add_argument("--budget", type=float, default=80.0, help="CPU seconds of training for each contestant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file; a picture goes beside it")
    parser.add_argument("--summary", action="store_true", help="only print and draw what is recorded")
    given = parser.parse_args()
    out = given.out or RESULTS / f"end_to_end_{Path(given.data).name}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that contestants are stopped, too
    if not given.summary:
        began = time.perf_counter()
        run(
            given.only or list(CONTESTANTS), given.data, given.epochs, given.patience, given.budget, given.threads,
            given.seed, out,
        )  # fmt: skip
        print(f"{time.perf_counter() - began:.0f} s")
    record = read(out)
    draw(record, out.with_suffix(".png"))
    print(f"{summary(record)}\nwritten: {out}")


if __name__ == "__main__":
    main()
