"""Quality of the models on prepared or raw data sets, over several seeds: writes benchmarks/RESULTS.md.

    python benchmarks/quality.py FOLDER [FOLDER ...] --seeds 3 --work runs/quality

Each FOLDER holds interactions.csv.gz and items.csv.gz. Every model is trained to its own best validation (early stopping), then
ranked once on the test answers, `aligned` and `full`. Runs that are already in --work are not trained again, so the command can
be cut and repeated; two processes may share the work by --seeds-from.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import write_atomically
from cafe.data.prepare import prepare
from cafe.evaluate import evaluate
from cafe.evaluation import Evaluation, compare
from cafe.train import fit, load_run

RECIPES = {
    "PopRec": ("poprec", "paper", {}),
    "SASRec `paper`": ("sasrec", "paper", {"dim": 64}),
    "SASRec `best`": ("sasrec", "best", {}),
    "SASRec `best` + composed items": ("sasrec", "best", {"compose_items": True}),
    "CAFE `paper`": ("cafe", "paper", {"dim": 64}),
    "CAFE `best`": ("cafe", "best", {}),
    "CAFE `best`, no mask": ("cafe", "best", {"distance_mask": False}),
}
METRICS = ("ndcg@5", "hr@5", "ndcg@10", "mrr")
PAIRS = (
    ("CAFE `paper`", "SASRec `paper`"),
    ("CAFE `best`", "SASRec `paper`"),
    ("CAFE `best`", "SASRec `best`"),
    ("CAFE `best`", "SASRec `best` + composed items"),
    ("CAFE `best`", "CAFE `best`, no mask"),
)


def run(name: str, seed: int, data: Path) -> Path:
    """Trains and ranks one recipe with one seed, unless it is there; returns its folder."""
    model, preset, options = RECIPES[name]
    out = data.parent / f"{name.replace('`', '').replace(' ', '_').replace(',', '')}-{seed}"
    if not (out / "test-full.npz").exists():
        dataset = Dataset.load(data)
        resume = (out / "config.json").exists()
        fit(Config.make(model, preset, seed=seed, **options), dataset, out, data=data, resume=resume)
        trained, _ = load_run(out)
        for protocol in ("aligned", "full"):
            evaluate(trained, dataset, "test", protocol, batch_size=1024, name=name).save(out / f"test-{protocol}.npz")
        print(f"{out}: trained", flush=True)
    return out


def table(results: dict[str, list[Evaluation]], score: str | None) -> list[str]:
    lines = ["| model | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, seeds in results.items():
        cells = []
        for metric in METRICS:
            values = [result.mean(metric, score if score in result.greater else None) for result in seeds]
            cells.append(f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.4f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def buckets(results: dict[str, list[Evaluation]], metric: str) -> list[str]:
    groups = list(next(iter(results.values()))[0].buckets("train_frequency"))
    lines = ["| model | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for name, seeds in results.items():
        values = np.mean([result.values(metric) for result in seeds], axis=0)
        masks = seeds[0].buckets("train_frequency")
        lines.append(
            f"| {name} | " + " | ".join(f"{values[m].mean():.4f}" if m.any() else "-" for m in masks.values()) + " |"
        )
    return lines


def report(folders: list[Path], work: Path, seeds: int) -> str:
    lines = [
        "# Quality",
        "",
        f"Written by `python benchmarks/quality.py`; {seeds} seeds, mean ± standard deviation over seeds. Each model is trained to its "
        "own best validation (aligned NDCG@10, early stopping) and ranked once on the test answers. d = 64, n = 50, 1 head, 2 blocks, "
        "Adam 1e-3; the presets are in `cafe/config.py`. `paper` is Eq. 1-10 with one uniform negative; `best` is sampled softmax. "
        "The joint score is shown where a model has one.",
    ]
    for folder in folders:
        data = work / folder.name / "data"
        stats = Dataset.load(data).stats()
        lines += [
            "",
            f"## {folder.name}",
            "",
            ", ".join(
                f"{k.replace('_', ' ')} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}"
                for k, v in stats.items()
                if k != "density"
            ),
        ]
        for protocol in ("aligned", "full"):
            results = {
                name: [Evaluation.load(run(name, seed, data) / f"test-{protocol}.npz") for seed in range(seeds)]
                for name in RECIPES
            }
            lines += ["", f"### {protocol}", "", *table(results, None)]
            lines += [
                "",
                "Item score alone:",
                "",
                *table({n: r for n, r in results.items() if "joint" in r[0].greater}, "item"),
            ]
            lines += ["", "NDCG@10 by how often training has the answer:", "", *buckets(results, "ndcg@10"), ""]
            for a, b in PAIRS:
                for metric in ("ndcg@5", "ndcg@10"):
                    c = compare(results[a], results[b], metric)
                    low, high = c["ratio_ci"] or (float("nan"), float("nan"))
                    lines.append(f"- {metric}: {a} is {c['ratio']:.2f}x {b} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines) + "\n"


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders with interactions.csv.gz and items.csv.gz.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    seeds_from: Annotated[int, typer.Option(help="Train only from this seed on; no report.")] = 0,
    work: Annotated[Path, typer.Option()] = Path("runs/quality"),
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    torch.set_num_threads(threads)
    for folder in folders:
        data = work / folder.name / "data"
        if not data.exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            prepare(folder / "interactions.csv.gz", folder / "items.csv.gz", data)
        for seed in range(seeds_from, seeds):
            for name in RECIPES:
                run(name, seed, data)
    if seeds_from == 0:
        write_atomically({Path(__file__).with_name("RESULTS.md"): [report(folders, work, seeds).encode()]})
        print(json.dumps({"written": "benchmarks/RESULTS.md"}))


if __name__ == "__main__":
    typer.run(main)
