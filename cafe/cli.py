"""The `cafe` command: prepare, simulate, train, evaluate, compare, report, recommend, export, doctor.

Results go to standard output (with --json: one JSON object and nothing else), progress and warnings to standard error.
A mistake in the input is one line and exit code 1; a mistake in the options exits with 2; Ctrl-C with 130.
"""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text
except ModuleNotFoundError as missing:
    hint = "; without it: python -m cafe.doctor" if sys.argv[1:2] == ["doctor"] else ""
    sys.exit(f'error: the cafe command needs {missing.name}: pip install "cafe-kernels[cli]"{hint}')

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Coarse-to-fine sparse sequential recommendation.",
)
# Ids and paths may hold [ and :, so nothing printed is markup; colours are given as styles.
out_console, err_console = (Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))

TOO_LARGE = "DefaultCPUAllocator", "Storage size calculation overflowed"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Data = Annotated[Path | None, typer.Option(help="Prepared dataset, if not where the run was trained.")]


def main() -> None:
    """Entry point: runs the app and turns errors into one clear line."""
    warnings.showwarning = lambda message, *_, **__: _tell("warning", "yellow", message)
    try:
        sys.exit(app(standalone_mode=False) or 0)  # Typer returns the code of typer.Exit, and 130 after Ctrl-C
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CAFE_TRACEBACK"):
            raise
        if hasattr(error, "format_message"):  # click's own: wrong options
            _tell("error", "red", error.format_message())
            sys.exit(2)
        if any(words in str(error) for words in TOO_LARGE):  # PyTorch's MemoryError is a RuntimeError
            error = MemoryError(f"out of memory ({str(error).split('DefaultCPUAllocator: ')[-1]})")
        if not isinstance(error, (ValueError, OSError, MemoryError)) and not type(error).__module__.startswith(
            "polars"
        ):
            raise
        _tell("error", "red", " ".join(str(error).split()))
        sys.exit(1)


def _tell(kind: str, colour: str, message: object) -> None:
    err_console.print(Text.assemble((f"{kind}: ", colour), str(message)), soft_wrap=True)


def emit(data: dict[str, Any]) -> None:
    print(json.dumps(data, default=str))


@app.command()
def prepare(
    interactions: Annotated[Path, typer.Option(help="A file, plain or gzip, or a folder of parts.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    items: Annotated[Path | None, typer.Option(help="Item and intent of every item.")] = None,
    format: Annotated[
        Literal["table", "amazon", "tmall", "ijcai16", "recbole"],
        typer.Option(help="table: CSV or Parquet. The others: the raw files of these data sets (docs/data.md)."),
    ] = "table",
    user_col: Annotated[
        str | None, typer.Option(help="Column of the user.", show_default="user, or the format's")
    ] = None,
    item_col: Annotated[
        str | None, typer.Option(help="Column of the item.", show_default="item, or the format's")
    ] = None,
    time_col: Annotated[
        str | None, typer.Option(help="Column of the timestamp.", show_default="timestamp, or the format's")
    ] = None,
    intent_col: Annotated[
        str | None,
        typer.Option(help="Column of the intent.", show_default="intent, or the format's category or seller"),
    ] = None,
    separator: Annotated[str, typer.Option(help="Of CSV files.")] = ",",
    intent_level: Annotated[
        int, typer.Option(help="How much of a category path is the intent: 1 its root, -1 all, -2 all but the last.")
    ] = -1,
    seq_separator: Annotated[str, typer.Option(help="Between the parts of a RecBole sequence.")] = " ",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Only interactions with these values: column=value[,value]; repeat for several columns."),
    ] = None,
    min_sequence_length: Annotated[int, typer.Option(min=1, help="Fewest interactions of a user.")] = 1,
    min_item_count: Annotated[
        int, typer.Option("--min-item-count", "-k", min=1, help="Fewest interactions of an item.")
    ] = 1,
    duplicates: Annotated[
        Literal["keep", "exact", "first", "last"], typer.Option(help="Of a user and an item.")
    ] = "keep",
    drop_incomplete: Annotated[
        bool, typer.Option(help="Drop rows with a missing value instead of refusing them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn files of interactions and items into a dataset.

    Example: cafe prepare --interactions buys.csv.gz --items items.csv --out data/shop

    cafe prepare --format tmall --interactions user_log_format1.csv --keep action_type=2 --out data/tmall
    """
    from cafe.data.prepare import prepare as run

    dataset = run(
        interactions, items, out, format=format, user_col=user_col, item_col=item_col, time_col=time_col,
        intent_col=intent_col, separator=separator, intent_level=intent_level, seq_separator=seq_separator,
        keep=dict(map(_values, keep or [])), min_sequence_length=min_sequence_length, min_item_count=min_item_count,
        duplicates=duplicates, drop_incomplete=drop_incomplete, progress=lambda step: err_console.print(f"{step} ...", soft_wrap=True),
    )  # fmt: skip
    report = {"out": str(out), "stats": dataset.stats(), "preparation": dataset.preparation}
    if as_json:
        return emit(report)
    from rich.table import Table

    table = Table(title=f"{out}", show_header=False)
    for name, value in dataset.stats().items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    out_console.print(table)
    out_console.print_json(data=dataset.preparation, default=str)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    preset: Annotated[str, typer.Option(help="demo, sparse, amazon or tmall.")] = "demo",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Write the files of a simulated shop; amazon and tmall have the counts of the paper's Table 1.

    Planted: a user stays in an intent, moves along a graph of intents, or returns to one of three favourites; within an intent
    the next item is often a close successor of the last one; popularity is Zipf's. Every item and intent occurs.

    Example: cafe simulate --preset sparse --out shop
    """
    from cafe.data.simulate import simulate as run

    paths = {name: str(path) for name, path in run(preset, out, seed).items()}
    if as_json:
        emit(paths | {"preset": preset, "seed": seed, "simulated": True})
    else:
        out_console.print("simulated: " + ", ".join(paths.values()), highlight=False, soft_wrap=True)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    data: Annotated[Path | None, typer.Option(help="Prepared dataset; with --resume that of the run.")] = None,
    model: Annotated[
        str | None, typer.Option(help="One of the ten of Table 2: sasrec, bert4rec, ...", show_default="cafe")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="paper or best.", show_default="best")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's learning rate.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of embeddings and encoders.")] = None,
    max_len: Annotated[int | None, typer.Option(min=1, help="Longest history read.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the configuration: name=value.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or bf16, of products in training.", show_default="fp32")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    table: Annotated[
        str, typer.Option(help="Where the item table is: device, or host if it is larger than that.")
    ] = "device",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, with validation and early stopping.

    Example: cafe train --data data/shop --model cafe --preset best --out runs/cafe
    """
    import torch

    from cafe.config import Config
    from cafe.data.dataset import Dataset
    from cafe.runs import read_run
    from cafe.train import Interrupted, fit

    if torch.distributed.is_torchelastic_launched():  # by torchrun: several processes train together
        from cafe.distributed import fit
    if threads:
        torch.set_num_threads(threads)
    overrides: dict[str, Any] = {
        "epochs": epochs, "seed": seed, "batch_size": batch_size, "lr": lr, "dim": dim, "max_len": max_len, "precision": precision
    }  # fmt: skip
    overrides = {name: value for name, value in overrides.items() if value is not None} | dict(
        map(_assignment, option or [])
    )
    if fixed := {"model", "preset"} & overrides.keys():
        raise ValueError(f"--set {fixed.pop()}=...: it has an option of its own")
    if resume:
        run = read_run(out)
        config = Config(**run["config"])
        given = overrides | {name: value for name, value in (("model", model), ("preset", preset)) if value is not None}
        for name, value in given.items():
            if not hasattr(config, name) or getattr(config, name) != value:
                raise ValueError(
                    f"--resume goes on with the options of {out}, where {name} is {getattr(config, name, 'unknown')!r}, not "
                    f"{value!r}: leave it out, or start a new run"
                )
        data = data or run["data"]
    else:
        config = Config.make(model or "cafe", preset or "best", **overrides)
    if data is None:
        raise ValueError("which dataset? Give --data")
    dataset = Dataset.load(data)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(), console=err_console, disable=not err_console.is_terminal,
    )  # fmt: skip
    lines: list[dict[str, Any]] = []
    with bar:
        task = bar.add_task(f"{config.model} {config.preset}", total=None, status="")
        rate = _Rate()

        def progress(event: dict[str, Any]) -> None:
            if "tokens" in event:
                status = f"loss {event['loss']:.3f}  {rate(event['tokens']):,.0f} tokens/s"
                return bar.update(task, completed=event["step"], total=event["steps"], status=status)
            lines.append(event)
            valid = "  ".join(f"{name} {value:.4f}" for name, value in event.get("valid", {}).items())
            bar.console.print(
                f"epoch {event['epoch'] + 1:3d}  loss {event.get('loss', 0):.4f}  valid {valid}",
                highlight=False,
                soft_wrap=True,
            )

        try:
            fit(config, dataset, out, data=data, resume=resume, device=device, table=table, progress=progress)
        except Interrupted as stop:
            err_console.print(str(stop), highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    best = max((line for line in lines if "valid" in line), key=lambda line: line["valid"]["ndcg@10"], default=None)
    if as_json:
        return emit(
            {"run": str(out), "model": config.model, "preset": config.preset, "epochs": len(lines), "best": best}
        )
    if best:
        out_console.print(
            f"{out}: best validation NDCG@10 {best['valid']['ndcg@10']:.4f} ({config.valid_protocol}) "
            f"after epoch {best['epoch'] + 1}. Next: cafe evaluate --run {out}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    protocol: Annotated[str, typer.Option(help="aligned, full or authors.")] = "aligned",
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the candidates; the same for all runs to compare.")] = 0,
    max_users: Annotated[int | None, typer.Option(min=1, help="A random sample of so many users.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another run, for a paired comparison.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Rank every user's held-out item, with 95% intervals and a breakdown by item frequency and history length.

    Example: cafe evaluate --run runs/cafe --protocol full
    """
    from cafe.evaluation import compare as paired
    from cafe.tables import print_comparison, print_evaluation

    runs = [run] if baseline is None else [run, baseline]
    results = _told_apart([_evaluate(path, data, split, protocol, seed, max_users) for path in runs], runs)
    if as_json:
        summary = results[0].summary()
        if baseline is not None:
            summary["comparison"] = paired(*results)
        return emit(summary)
    print_evaluation(out_console, results, breakdown="ndcg@10")
    if baseline is not None:
        print_comparison(out_console, paired(*results))


@app.command()
def compare(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; the first is the baseline.")] = None,
    config: Annotated[
        str | None, typer.Option(help="An experiment: table2, table3, figure4 or a TOML file; trains it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --config: folder for the runs.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --config: how many, if not as it says.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    protocol: Annotated[list[str] | None, typer.Option(help="Repeat for several; by default aligned and full.")] = None,
    metric: Annotated[str, typer.Option()] = "ndcg@5",
    split: Annotated[str, typer.Option()] = "test",
    seed: Annotated[int, typer.Option()] = 0,
    max_users: Annotated[int | None, typer.Option(min=1)] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the comparison in.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """One table of several runs on the same users and candidates, with each gain over the first and its interval.

    With --config, of the systems of an experiment, each trained over several seeds: the tables of the paper on your data. A cut run
    is gone on with by the same command.

    Example: cafe compare runs/sasrec runs/cafe

    cafe compare --config table2 --data data/shop --out runs/table2
    """
    import numpy as np

    from cafe.metrics import METRICS, expected_metric

    expected_metric(metric, np.zeros(1, int), np.zeros(1, int))  # an unknown one is refused before the work
    if plot is not None and metric not in METRICS:
        raise ValueError(f"--plot draws one of {', '.join(METRICS)}, not {metric}")
    if threads:
        import torch

        torch.set_num_threads(threads)
    if config is not None:
        if runs or data is None or out is None or plot is not None or split != "test" or max_users is not None or seed:
            raise ValueError(
                "--config goes with --data and --out (and --seeds, --protocol, --metric, --threads, --device) alone"
            )
        return _compare_experiment(config, data, out, seeds, device, protocol, metric, as_json)
    if not runs or out is not None or seeds is not None:
        raise ValueError("give run folders to compare, or --config with --data and --out")
    from cafe.evaluation import compare as paired
    from cafe.tables import print_comparison, print_evaluation

    report: dict[str, Any] = {}
    for name in protocol or ["aligned", "full"]:
        evaluated = [_evaluate(path, data, split, name, seed, max_users) for path in runs]
        results = _told_apart(evaluated, runs)
        gains = [paired(result, results[0], metric) for result in results[1:]]
        summaries = [
            {"run": str(path), "label": result.label, **original.summary()}
            for path, result, original in zip(runs, results, evaluated, strict=True)
        ]
        report[name] = {"runs": summaries, "gains": gains}
        if not as_json:
            print_evaluation(out_console, results)
            if gains:
                print_comparison(out_console, gains)
    if as_json:
        emit(report)
    if plot is not None:
        from cafe.plots import plot_comparison

        plot_comparison(report, metric, plot)


def _compare_experiment(
    config: str,
    data: Path,
    out: Path,
    seeds: int | None,
    device: str,
    protocol: list[str] | None,
    metric: str,
    as_json: bool,
) -> None:
    from cafe.experiment import checked_protocols, read_experiment, run_experiment
    from cafe.tables import SHOWN, experiment_markdown
    from cafe.train import Interrupted

    experiment = read_experiment(config)
    protocols = checked_protocols(protocol or experiment.protocols)
    experiment = replace(experiment, seeds=seeds or experiment.seeds, protocols=protocols)

    def progress(name: str, seed: int) -> Any:
        err_console.print(f"{name}, seed {seed}", highlight=False, soft_wrap=True)
        return lambda event: None

    try:
        results = run_experiment(experiment, data, out, device=device, progress=progress)
    except Interrupted:
        err_console.print("interrupted; saved. Go on with the same command", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        return emit(
            {
                name: {system: [one.summary() for one in ones] for system, ones in part.items()}
                for name, part in results.items()
            }
        )
    text = experiment_markdown(results, experiment.baseline, [metric, *(name for name in SHOWN if name != metric)])
    print(text)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder for index.html and its figures.")],
    runs: Annotated[list[Path], typer.Option(help="Run folders, or folders of runs (compare --config --out).")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="", hidden=True)] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Prepared dataset, if not where a run was trained.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="System to compare with.", show_default="the experiment's, else SASRec")
    ] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="Repeat for several; by default all three.")] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    as_json: Json = False,
) -> None:
    """Write one page about runs: tables with intervals, the paper's figures, learning curves, configuration.

    Runs of one system, folders SYSTEM-SEED, are averaged over their seeds; several datasets give the figure by sparsity.

    Example: cafe report --runs runs/table2 --out report

    cafe report --runs runs/k1 runs/k5 runs/k20 --out report
    """
    from cafe.report import PAGE, write_report

    try:
        notes = write_report(
            [*runs, *(more or [])], out, data=data or [], baseline=baseline, split=split,
            protocols=protocol or ["aligned", "full", "authors"],
            progress=lambda step: err_console.print(f"{step} ...", highlight=False, soft_wrap=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        err_console.print(
            "interrupted; no report was written. Evaluations that were finished are kept for the next one"
        )
        raise typer.Exit(130) from None
    if as_json:
        return emit({"page": str(out / PAGE), "notes": notes})
    for note in notes:
        _tell("note", "yellow", note)
    out_console.print(f"{out / PAGE}", highlight=False, soft_wrap=True)


@app.command()
def recommend(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    user: Annotated[str | None, typer.Option(help="A user of the dataset.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids, oldest first, separated by commas.")] = None,
    users: Annotated[Path | None, typer.Option(help="CSV or Parquet with a column `user`; needs --out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file to write for --users.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many items.")] = 10,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Recommend unseen items, with the intents behind them.

    Example: cafe recommend --run runs/cafe --history "i20,i21,i22" -k 5
    """
    from cafe.recommend import Recommender

    if sum(value is not None for value in (user, history, users)) != 1:
        raise ValueError("give exactly one of --user, --history and --users")
    if (users is None) != (out is None):
        raise ValueError("--users and --out go together")
    recommender = Recommender.load(run, data)
    if users is not None and out is not None:
        return _recommend_file(recommender, users, out, k, as_json)
    items = recommender.history_of(user) if user is not None else [part.strip() for part in (history or "").split(",")]
    answer = recommender.recommend([items], k, users=[user])[0]
    if as_json:
        return emit({"user": user, "history": items, "k": k, **vars(answer)})
    from rich.table import Table

    if answer.popular:
        out_console.print("No item of the history is known: these are the most popular items.")
    elif answer.top_intents:
        listed = ", ".join(f"{intent} ({share:.0%})" for intent, share in answer.top_intents)
        out_console.print(f"Expected next: {listed}", highlight=False, soft_wrap=True)
    table = Table("", "item", "intent", "score")
    for rank, row in enumerate(zip(answer.items, answer.intents, answer.scores, strict=True), 1):
        table.add_row(str(rank), str(row[0]), str(row[1]), f"{row[2]:.3f}")
    out_console.print(table)


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write the user tower as ONNX and the item vectors as .npy and Parquet, for serving (docs/serving.md).

    Example: cafe export --run runs/cafe --out serving/cafe
    """
    from cafe.export import export as write
    from cafe.runs import load_run

    meta = write(*load_run(run, data), out)
    if as_json:
        return emit({"out": str(out), **meta})
    out_console.print(f"{out}: score = {meta['score']}", highlight=False, soft_wrap=True)
    out_console.print(f"Next: python {out / 'serve.py'} ITEM,ITEM,...", highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what works here and what does not: versions, the extension, GPUs, and a test of every op. Exits with 1 if something is broken.

    Example: cafe doctor --json
    """
    from cafe.doctor import examine, text

    found = examine()
    emit(found) if as_json else print(text(found))
    if found["problems"]:
        raise typer.Exit(1)


def _recommend_file(recommender: Any, users: Path, out: Path, k: int, as_json: bool) -> None:
    import polars as pl

    from cafe.data.folders import write_atomically

    if not users.is_file():
        raise ValueError(f"--users {users} is no file: give a CSV or Parquet file with a column 'user'")
    frame = (
        pl.read_parquet(users, glob=False)
        if users.suffix == ".parquet"
        else pl.read_csv(users, infer_schema=False, glob=False)
    )
    if "user" not in frame.columns:
        raise ValueError(f"{users} has no column 'user'; it has {', '.join(frame.columns)}")
    ids, histories, unknown = [], [], []
    for user in frame["user"]:
        try:
            histories.append(recommender.history_of(user))
            ids.append(user)
        except ValueError:
            unknown.append(user)
    if unknown:
        warnings.warn(
            f"{users}: {len(unknown)} users skipped that are not in the dataset, the first is {unknown[0]!r}",
            stacklevel=2,
        )
    answers = recommender.recommend(histories, k, users=ids)
    dataset = recommender.dataset
    schema = {
        "user": frame["user"].dtype, "rank": pl.Int64, "item": dataset.item_ids.dtype,
        "intent": dataset.intent_ids.dtype, "score": pl.Float64,
    }  # fmt: skip
    table = pl.DataFrame(
        [
            {"user": user, "rank": rank, "item": item, "intent": intent, "score": score}
            for user, answer in zip(ids, answers, strict=True)
            for rank, (item, intent, score) in enumerate(
                zip(answer.items, answer.intents, answer.scores, strict=True), 1
            )
        ],
        schema,
    )
    import io

    buffer = io.BytesIO()
    table.write_parquet(buffer)
    write_atomically({out: [buffer.getvalue()]})
    report = {"out": str(out), "users": len(ids), "skipped": len(unknown), "rows": len(table)}
    if as_json:
        emit(report)
    else:
        out_console.print(f"{out}: {len(table):,} rows for {len(ids):,} users", highlight=False, soft_wrap=True)


def _evaluate(run: Path, data: Path | None, split: str, protocol: str, seed: int, max_users: int | None) -> Any:
    from cafe.evaluate import evaluate as rank
    from cafe.runs import load_run

    model, dataset = load_run(run, data)
    with Progress(console=err_console, transient=True, disable=not err_console.is_terminal) as bar:
        task = bar.add_task(escape(f"{run.name}, {protocol}"))
        result = rank(
            model, dataset, split, protocol, seed=seed, max_users=max_users,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if max_users is None:  # a sample does not replace the evaluation of everybody
        result.keep(run)
    return result


def _told_apart(results: list[Any], runs: list[Path]) -> list[Any]:
    """The results, with the folder of the run in the labels that would read alike."""
    labels = [result.label for result in results]
    names = [str(path) if [other.name for other in runs].count(path.name) > 1 else path.name for path in runs]
    return [
        replace(result, model=f"{label} ({name})", preset=None) if labels.count(label) > 1 else result
        for result, label, name in zip(results, labels, names, strict=True)
    ]


def _values(text: str) -> tuple[str, list[str]]:
    column, equals, values = text.partition("=")
    if not equals or not column or not values:
        raise ValueError(f"--keep {text!r}: expected column=value[,value]")
    return column, values.split(",")


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text!r}: expected name=value")
    try:
        return name, json.loads(value.lower() if value in ("True", "False") else value)
    except ValueError:
        return name, value


class _Rate:
    """Tokens a second since the first call."""

    def __init__(self) -> None:
        self.started, self.tokens = 0.0, 0

    def __call__(self, tokens: int) -> float:
        from time import monotonic

        self.started = self.started or monotonic()
        self.tokens += tokens
        return self.tokens / max(monotonic() - self.started, 1e-9)


if __name__ == "__main__":
    main()
