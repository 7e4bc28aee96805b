"""Quality of the models on raw data sets, over several seeds: writes benchmarks/RESULTS.md.

    python benchmarks/quality.py FOLDER [FOLDER ...] --seeds 3 --work runs/quality

Each FOLDER holds interactions.csv.gz and items.csv.gz. On each, the paper's Tables 2 and 3 and what goes beyond the paper
(quality.toml), as `cafe compare --config` does: every model is trained to its own best validation (early stopping), then ranked once on
the test answers. Runs that are already in --work are not trained again, so the command can be cut and repeated; systems and seeds that
are not yet trained are left out with --only-trained, so that tables of what there is can be written at any time.
"""

import json
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from cafe.data.dataset import Dataset
from cafe.data.folders import write_atomically
from cafe.data.prepare import prepare
from cafe.evaluation import Evaluation, Results, compare
from cafe.experiment import Experiment, read_experiment, run_experiment, slug
from cafe.tables import experiment_markdown

BEYOND = Path(__file__).with_suffix(".toml")
EXPERIMENTS = {"Table 2": "table2", "Table 3": "table3", "Beyond the paper": str(BEYOND)}
PAIRS = [  # (system, over which other), of "Beyond the paper"
    ("CAFE `paper`", "SASRec `paper`"),
    *(("CAFE `best`", other) for other in read_experiment(BEYOND).systems if other != "CAFE `best`"),
]
HEAD = """
# Quality

Written by `python benchmarks/quality.py`: mean ± standard deviation over seeds, gains paired over users with their 95% interval. Each
system is trained to its own best validation (aligned NDCG@10, early stopping after 10 validations without a better one, at most 100
epochs) and ranked once on the test answers: `aligned` and `full` measure ([docs/protocol.md](../docs/protocol.md)), `authors` shows an
artefact. d = 64, n = 50, 2 blocks, Adam 1e-3. In Tables 2 and 3 every system has the objective of its own paper and batches of 64:
SASRec, SSE-PT, FDSA and CAFE one uniform negative (Eq. 9), the cloze systems the softmax over all items with 0.6 hidden; nothing is
tuned per data set. `best` is in `cafe/config.py`, found on the validation answers of Beauty sparse alone. Seconds are of the wall
clock: those of the dense Beauty ran beside other work, and compare to nothing.

## The paper's own numbers

They are of other data and another protocol, so only the order of systems can be set beside ours: its Amazon set is a larger, sparser one
(category as intent), its Tmall log is not here (seller as intent); d = 128; and its released code scores candidates as `authors` does.

| paper's Table 2 | PopRec | SASRec | BERT4Rec | SSE-PT | LOCKER | NOVA | FDSA | BERT-F | LOCKER-F | CAFE |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
| Amazon, NDCG@5 | .0286 | .1418 | .1830 | .2108 | .2170 | .0281 | .0670 | .2199 | .2436 | .3733 |
| Amazon, HR@5 | .0487 | .1844 | .2240 | .2501 | .2597 | .0475 | .1089 | .2676 | .2947 | .4813 |
| Amazon, MRR | .0485 | .1522 | .1956 | .2239 | .2297 | .0477 | .0857 | .2329 | .2529 | .3656 |
| Tmall, NDCG@5 | .0360 | .0741 | .2753 | .2106 | .2961 | .0501 | .1083 | .2998 | .3182 | .4290 |
| Tmall, HR@5 | .0596 | .1205 | .3673 | .2977 | .3872 | .0812 | .1685 | .3917 | .4098 | .5152 |
| Tmall, MRR | .0577 | .0948 | .2782 | .2173 | .2979 | .0716 | .1265 | .3014 | .3189 | .4268 |

| paper's Table 3, Tmall | SASRec | +(1) FDSA | +(1)(2) | +(1)(2)(3) | +(1)(2)(4) | +(1)(2)(3)(4) CAFE |
|---|--:|--:|--:|--:|--:|--:|
| NDCG@5 | .0741 | .1083 | .3045 | .3159 | .4254 | .4290 |
| HR@5 | .1205 | .1685 | .3938 | .4066 | .5117 | .5152 |
| MRR | .0948 | .1265 | .3069 | .3172 | .4239 | .4268 |
""".lstrip()


def gain(a: list[Evaluation], b: list[Evaluation], metric: str) -> str:
    found = compare(a, b, metric)
    low, high = found["ratio_ci"] or (float("nan"), float("nan"))
    return f"{found['ratio']:.2f}x [{low:.2f}, {high:.2f}]"


def pairs(beyond: Results, table2: Results) -> list[str]:
    """The gain of one model over another, paired over users, with its interval."""
    kinds = [("aligned", "ndcg@5"), ("full", "ndcg@10")]
    heads = " | ".join(f"{protocol} {metric}" for protocol, metric in kinds)
    lines = [f"| gain, paired over users | {heads} |", "|---|--:|--:|"]
    for a, b in PAIRS:
        if not {a, b} <= beyond["aligned"].keys():
            continue
        cells = [gain(beyond[protocol][a], beyond[protocol][b], metric) for protocol, metric in kinds]
        lines.append(f"| {a} over {b} | {' | '.join(cells)} |")
    cells, names = [], []
    for protocol, metric in kinds:
        baselines = {name: runs for name, runs in table2[protocol].items() if name != "CAFE"}
        names.append(max(baselines, key=lambda name: np.mean([run.mean(metric) for run in baselines[name]])))
        cells.append(gain(beyond[protocol]["CAFE `best`"], baselines[names[-1]], metric))
    lines.append(
        f"| CAFE `best` over the best of Table 2's {len(baselines)} others ({', '.join(names)}) | {' | '.join(cells)} |"
    )
    return lines


def cost(work: Path, experiment: Experiment, tokens: int) -> list[str]:
    """How long each system trained until its best validation, in epochs and in seconds of steps alone."""
    lines = ["| training to the best validation | epochs | s |", "|---|--:|--:|"]
    for name in experiment.systems:
        epochs, seconds = [], []
        for seed in range(experiment.seeds):
            text = (work / f"{slug(name)}-{seed}" / "metrics.jsonl").read_text()
            rows = [json.loads(line) for line in text.splitlines()]
            best = int(np.argmax([row["valid"]["ndcg@10"] if "valid" in row else -1.0 for row in rows]))
            epochs.append(best + 1)
            seconds.append(sum(tokens / row["tokens_per_s"] for row in rows[: best + 1] if "tokens_per_s" in row))
        lines.append(f"| {name} | {np.mean(epochs):.0f} | {np.mean(seconds):.0f} |")
    return lines


def section(folder: Path, seeds: int | None, work: Path, only_trained: bool) -> str:
    """The part of RESULTS.md on one folder's data."""
    data = work / folder.name / "data"
    if not data.exists():
        prepare(folder / "interactions.csv.gz", folder / "items.csv.gz", data)
    dataset, parts, results = Dataset.load(data), [], {}
    for title, config in EXPERIMENTS.items():
        out, experiment = work / folder.name / slug(title), read_experiment(config)
        experiment = trained(experiment, out) if only_trained else replace(experiment, seeds=seeds or experiment.seeds)
        if not experiment.systems:
            continue
        results[title] = run_experiment(experiment, data, out)
        tables = (
            experiment_markdown(results[title], experiment.baseline)
            .replace("\n###", "\n####")
            .replace("###", "####", 1)
        )
        runs = f"{experiment.seeds} seed{'s' * (experiment.seeds > 1)}"
        parts += [f"### {folder.name}: {title}, {runs}", "", tables]
        if title == "Beyond the paper":
            tokens = int((dataset.train().lengths - 1).clip(min=0, max=50).sum())
            parts += [*pairs(results[title], results["Table 2"]), "", *cost(out, experiment, tokens), ""]
    stats = [
        f"{name.replace('_', ' ')} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in dataset.stats().items()
        if name != "density"
    ]
    return "\n".join([f"## {folder.name}", "", ", ".join(stats) + ".", "", *parts])


def trained(experiment: Experiment, out: Path) -> Experiment:
    """The part of an experiment that is trained and ranked: the systems that have a seed, and the seeds that all of these have."""
    file, counts = Evaluation.file_name("test", "aligned"), {}
    for name in experiment.systems:
        there = ((out / f"{slug(name)}-{seed}" / file).exists() for seed in range(experiment.seeds))
        counts[name] = sum(takewhile(bool, there))
    systems = {name: config for name, config in experiment.systems.items() if counts[name]}
    return replace(experiment, systems=systems, seeds=min((counts[name] for name in systems), default=0))


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders with interactions.csv.gz and items.csv.gz.")],
    seeds: Annotated[int | None, typer.Option(min=1)] = None,
    work: Annotated[Path, typer.Option()] = Path("runs/quality"),
    threads: Annotated[int, typer.Option()] = 1,
    only_trained: Annotated[bool, typer.Option(help="Write what there is, and train nothing.")] = False,
) -> None:
    torch.set_num_threads(threads)
    text = "\n".join([HEAD, *(section(folder, seeds, work, only_trained) for folder in folders)])
    write_atomically({Path(__file__).with_name("RESULTS.md"): [text.rstrip().encode() + b"\n"]})
    print(json.dumps({"written": "benchmarks/RESULTS.md"}))


if __name__ == "__main__":
    typer.run(main)
