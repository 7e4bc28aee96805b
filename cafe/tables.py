"""Evaluations as tables on the terminal: metrics with their 95% intervals, breakdowns, paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cafe.evaluation import BUCKETS, Evaluation, Results, compare

SHOWN = ("ndcg@5", "hr@5", "ndcg@10", "mrr")


def print_evaluation(
    console: Console,
    evaluations: Evaluation | Sequence[Evaluation],
    metrics: Sequence[str] = SHOWN,
    breakdown: str | None = None,
) -> None:
    """One table, a row for each evaluation and score; below it what a reader must know about the numbers.

    Args:
        console: where to print.
        evaluations: one, or several (models, protocols).
        metrics: the columns.
        breakdown: a metric to print by training frequency and history length as well, for each evaluation.

    Example:
        >>> print_evaluation(Console(), [aligned, full], breakdown="ndcg@10")  # doctest: +SKIP
    """
    many = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    summaries = [evaluation.summary() for evaluation in many]
    groups: dict[tuple[str, str, int], list[tuple[Evaluation, dict[str, Any]]]] = {}
    for evaluation, summary in zip(many, summaries, strict=True):
        groups.setdefault((evaluation.protocol, evaluation.split, len(evaluation.users)), []).append(
            (evaluation, summary)
        )
    for (protocol, split, users), members in groups.items():
        artefact = protocol == "authors"
        table = Table(
            title=f"{protocol}{' (artefact)' if artefact else ''}, {split}, mean of {users:,} users ± half its 95% interval",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("model", "score", *metrics):
            table.add_column(column, justify="right" if column in metrics else "left", no_wrap=True)
        for evaluation, summary in members:
            parts = [(evaluation.headline, summary)]
            if evaluation.headline != "item":
                parts.append(("item", summary["item_score"]))
            for score, part in parts:
                cells = [_cell(part["metrics"][metric], part["ci"][metric]) for metric in metrics]
                table.add_row(Text(evaluation.label), score, *cells, style="yellow" if artefact else None)
        console.print(table)
    for evaluation in many:
        if evaluation.short:
            console.print(
                f"{evaluation.label}, {evaluation.protocol}: {evaluation.short:,} users have fewer than "
                f"{evaluation.num_negatives} negatives, the catalog has no more.",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
    if breakdown is not None:
        for evaluation, summary in zip(many, summaries, strict=True):
            console.print(_breakdown(evaluation, summary, breakdown))


def print_comparison(console: Console, comparisons: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """One table of what `cafe.evaluation.compare` returned, a row each: the relative gain and its 95% interval."""
    many = [comparisons] if isinstance(comparisons, dict) else list(comparisons)
    table = Table(title="Paired over users: gain = mean / mean of the other - 1 [95% interval]", box=SIMPLE_HEAD)
    for column in ("model", "against", "protocol", "metric"):
        table.add_column(column)
    for column in ("gain", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in many:
        gain = "-" if row["ratio"] is None else f"{row['ratio'] - 1:+.0%}"
        if row["ratio_ci"] is not None:
            gain += " [{:+.0%}, {:+.0%}]".format(*(bound - 1 for bound in row["ratio_ci"]))
        cells = (Text(row["a"]), Text(row["b"]), row["protocol"], row["metric"], gain, f"{row['p']:.3f}")
        table.add_row(*cells, style="yellow" if row["protocol"] == "authors" else None)
    console.print(table)


def experiment_markdown(results: Results, baseline: str, metrics: Sequence[str] = SHOWN) -> str:
    """Markdown of an experiment: for each protocol the mean ± standard deviation over seeds, gains, and a breakdown.

    A gain is over `baseline` by the first metric, paired over users (each user's values averaged over the seeds), with its 95% interval.
    Systems with a joint score have a second line, of their item score alone.
    """
    lines = []
    for protocol, systems in results.items():
        first = next(iter(systems.values()))[0]
        lines += [
            f"### {protocol}{' (an artefact: see docs/protocol.md)' if protocol == 'authors' else ''}",
            "",
            f"{len(first.users):,} users, {first.split}, against {first.against}.",
            "",
            f"| system | {' | '.join(metrics)} | {metrics[0]} over {_cells(baseline)} |",
            "|---" * (len(metrics) + 2) + "|",
        ]
        for name, seeds in systems.items():
            for score in seeds[0].scores:
                cells = [_over_seeds([seed.mean(metric, score) for seed in seeds]) for metric in metrics]
                gain = "" if name == baseline else _gain(compare(seeds, systems[baseline], metrics[0], score))
                shown = _cells(name) + ("" if score == seeds[0].headline else ", item score")
                lines.append(f"| {shown} | {' | '.join(cells)} | {gain} |")
        for by, title in (
            ("train_frequency", "how often training has the answer"),
            ("history_length", "history length"),
        ):
            groups = first.buckets(by)
            lines += [
                "",
                f"ndcg@10 by {title}:",
                "",
                f"| system | {' | '.join(groups)} |",
                "|---" * (len(groups) + 1) + "|",
            ]
            lines.append(f"| users | {' | '.join(f'{members.sum():,}' for members in groups.values())} |")
            for name, seeds in systems.items():
                values = np.mean([seed.values("ndcg@10") for seed in seeds], axis=0)
                cells = [f"{values[members].mean():.4f}" if members.any() else "-" for members in groups.values()]
                lines.append(f"| {_cells(name)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(name: str) -> str:
    """A name of any characters in one cell of a Markdown table."""
    return " ".join(name.split()).replace("|", "\\|")


def _over_seeds(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def _gain(comparison: dict[str, Any]) -> str:
    if comparison["ratio_ci"] is None:
        return "-"
    return "{:.2f}x [{:.2f}, {:.2f}]".format(comparison["ratio"], *comparison["ratio_ci"])


def _breakdown(evaluation: Evaluation, summary: dict[str, Any], metric: str) -> Table:
    title = f"{evaluation.label}, {evaluation.protocol}, {evaluation.headline} score, by bucket"
    table = Table(title=Text(title, style="table.title"))
    table.add_column("by")
    for column in ("bucket", "users", metric):
        table.add_column(column, justify="right")
    for name in BUCKETS:
        for bucket, part in summary["buckets"][name].items():
            cell = _cell(part["metrics"][metric], part["ci"][metric]) if part["users"] else "-"
            table.add_row(name.replace("_", " "), bucket, f"{part['users']:,}", cell)
        table.add_section()
    return table


def _cell(value: float, ci: Sequence[float]) -> str:
    return f"{value:.4f} ±{(ci[1] - ci[0]) / 2:.3f}".replace("0.", ".")
