"""Evaluations as tables on the terminal: metrics with their 95% intervals, breakdowns, paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cafe.evaluation import BUCKETS, Evaluation

SHOWN = ("ndcg@5", "hr@5", "ndcg@10", "mrr")
ARTEFACT = (
    "authors: NOT a measure of quality. This pairing gives the answer its true intent and every negative another one, "
    "so whatever knows the answer's intent ranks it high. Compare models by aligned and full."
)


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
    table = Table(title="Mean over users, with 95% bootstrap intervals over users")
    for column in ("model", "protocol", "split", "score"):
        table.add_column(column)
    for column in ("users", *metrics):
        table.add_column(column, justify="right")
    summaries = [evaluation.summary() for evaluation in many]
    for evaluation, summary in zip(many, summaries, strict=True):
        warn = evaluation.protocol == "authors"
        parts = [(evaluation.headline, summary)]
        if evaluation.headline != "item":
            parts.append(("item", summary["item_score"]))
        for score, part in parts:
            cells = [_cell(part["metrics"][metric], part["ci"][metric]) for metric in metrics]
            protocol = "authors (artefact)" if warn else evaluation.protocol
            row = [evaluation.label, protocol, evaluation.split, score, f"{len(evaluation.users):,}", *cells]
            table.add_row(*row, style="yellow" if warn else None)
    console.print(table)
    for evaluation in many:
        if evaluation.short:
            console.print(
                f"{evaluation.label}, {evaluation.protocol}: {evaluation.short:,} users have fewer than "
                f"{evaluation.num_negatives} negatives, the catalog has no more.",
                style="yellow",
            )
    if any(evaluation.protocol == "authors" for evaluation in many):
        console.print(f"Warning: {ARTEFACT}", style="bold yellow")
    if breakdown is not None:
        for evaluation, summary in zip(many, summaries, strict=True):
            console.print(_breakdown(evaluation, summary, breakdown))


def print_comparison(console: Console, comparisons: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
    """One table of what `cafe.evaluation.compare` returned, a row each: the relative gain and its 95% interval."""
    many = [comparisons] if isinstance(comparisons, dict) else list(comparisons)
    table = Table(title="Paired over users: gain = mean a / mean b - 1, with its 95% bootstrap interval")
    for column in ("a", "b", "protocol", "metric"):
        table.add_column(column)
    for column in ("mean a", "mean b", "a - b", "gain", "p", "users better / worse"):
        table.add_column(column, justify="right")
    for row in many:
        gain = "-" if row["ratio"] is None else f"{row['ratio'] - 1:+.1%}"
        if row["ratio_ci"] is not None:
            gain += " [{:+.1%}, {:+.1%}]".format(*(bound - 1 for bound in row["ratio_ci"]))
        table.add_row(
            row["a"],
            row["b"],
            row["protocol"],
            row["metric"],
            f"{row['mean_a']:.4f}",
            f"{row['mean_b']:.4f}",
            _cell(row["diff"], row["diff_ci"], "+.4f"),
            gain,
            f"{row['p']:.3f}",
            f"{row['better']:.1%} / {row['worse']:.1%}",
            style="yellow" if row["protocol"] == "authors" else None,
        )
    console.print(table)
    if any(row["protocol"] == "authors" for row in many):
        console.print(f"Warning: {ARTEFACT}", style="bold yellow")


def _breakdown(evaluation: Evaluation, summary: dict[str, Any], metric: str) -> Table:
    table = Table(title=f"{evaluation.label}, {evaluation.protocol}, {evaluation.headline} score, by bucket")
    table.add_column("by")
    for column in ("bucket", "users", metric):
        table.add_column(column, justify="right")
    for name in BUCKETS:
        for bucket, part in summary["buckets"][name].items():
            cell = _cell(part["metrics"][metric], part["ci"][metric]) if part["users"] else "-"
            table.add_row(name.replace("_", " "), bucket, f"{part['users']:,}", cell)
        table.add_section()
    return table


def _cell(value: float, ci: Sequence[float], form: str = ".4f") -> str:
    return f"{value:{form}} [{ci[0]:{form}}, {ci[1]:{form}}]"
