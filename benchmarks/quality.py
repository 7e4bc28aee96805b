"""Quality of the models on raw data sets, over several seeds: writes benchmarks/RESULTS.md.

    python benchmarks/quality.py FOLDER [FOLDER ...] --seeds 3 --work runs/quality

Each FOLDER holds interactions.csv.gz and items.csv.gz. Every model is trained to its own best validation (early stopping), then
ranked once on the test answers, `aligned` and `full`, as `cafe compare --config benchmarks/quality.toml` does. Runs that are already
in --work are not trained again, so the command can be cut and repeated.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from cafe.data.dataset import Dataset
from cafe.data.folders import write_atomically
from cafe.data.prepare import prepare
from cafe.evaluation import Results, compare
from cafe.experiment import Experiment, read_experiment, run_experiment
from cafe.tables import experiment_markdown

PAIRS = (
    ("CAFE `paper`", "SASRec `paper`"),
    ("CAFE `best`", "SASRec `paper`"),
    ("CAFE `best`", "SASRec `best`"),
    ("CAFE `best`", "SASRec `best` + composed items"),
    ("CAFE `best`", "CAFE `best`, no mask"),
)


def pairs(results: Results) -> list[str]:
    """The gain of one model over another, paired over users, with its interval."""
    lines = []
    for protocol, systems in results.items():
        for a, b in PAIRS:
            for metric in ("ndcg@5", "ndcg@10"):
                c = compare(systems[a], systems[b], metric)
                low, high = c["ratio_ci"] or (float("nan"), float("nan"))
                lines.append(f"- {protocol} {metric}: {a} is {c['ratio']:.2f}x {b} [{low:.2f}, {high:.2f}]")
    return lines


def report(results: dict[str, Results], work: Path, experiment: Experiment) -> str:
    lines = [
        "# Quality",
        "",
        f"Written by `python benchmarks/quality.py`; {experiment.seeds} seeds, mean ± standard deviation over seeds. Each model is trained "
        "to its own best validation (aligned NDCG@10, early stopping) and ranked once on the test answers. d = 64, n = 50, 1 head, 2 "
        "blocks, Adam 1e-3; the presets are in `cafe/config.py`. `paper` is Eq. 1-10 with one uniform negative; `best` is sampled "
        "softmax. The joint score is shown where a model has one.",
    ]
    for name, of_folder in results.items():
        stats = Dataset.load(work / name / "data").stats()
        counts = [
            f"{k.replace('_', ' ')} {v:,.4g}" if isinstance(v, float) else f"{k} {v:,}"
            for k, v in stats.items()
            if k != "density"
        ]
        tables = experiment_markdown(of_folder, experiment.baseline)
        lines += ["", f"## {name}", "", ", ".join(counts), "", tables, *pairs(of_folder)]
    return "\n".join(lines) + "\n"


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders with interactions.csv.gz and items.csv.gz.")],
    seeds: Annotated[int | None, typer.Option(min=1)] = None,
    work: Annotated[Path, typer.Option()] = Path("runs/quality"),
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    torch.set_num_threads(threads)
    experiment = read_experiment(Path(__file__).with_suffix(".toml"))
    experiment = replace(experiment, seeds=seeds or experiment.seeds)
    results = {}
    for folder in folders:
        data = work / folder.name / "data"
        if not data.exists():
            prepare(folder / "interactions.csv.gz", folder / "items.csv.gz", data)
        results[folder.name] = run_experiment(experiment, data, work / folder.name)
    write_atomically({Path(__file__).with_name("RESULTS.md"): [report(results, work, experiment).encode()]})
    print(json.dumps({"written": "benchmarks/RESULTS.md"}))


if __name__ == "__main__":
    typer.run(main)
