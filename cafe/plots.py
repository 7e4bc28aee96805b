"""The pictures: a run's learning curve, its distance masks, and runs compared."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from cafe.data.folders import write_atomically


def plot_curve(run: Path) -> None:
    """curve.png of a run folder: training loss and validation NDCG@10 by epoch, from metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line for line in lines if "valid" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(xlabel="epoch", ylabel="training loss", title=run.name)
    left.plot([line["epoch"] + 1 for line in lines], [line["loss"] for line in lines], color="tab:gray")
    right = left.twinx()
    right.plot(
        [line["epoch"] + 1 for line in valid],
        [line["valid"]["ndcg@10"] for line in valid],
        color="tab:blue",
        marker=".",
    )
    right.set_ylabel("validation NDCG@10", color="tab:blue")
    right.set_ylim(bottom=0)
    _save(figure, run / "curve.png")


def plot_theta(curves: Sequence[Tensor], lengths: np.ndarray, path: Path) -> None:
    """ln theta against distance, one panel a layer and one line a head, over how many pairs of tokens training had at a distance.

    Where these are few, a curve is still near the random one it started from.

    curves: (heads, n) a layer, from DistanceMaskedAttention.theta_curves.
    lengths: int (B,), of the training sequences, at most n.
    """
    longer = np.bincount(lengths)[:0:-1].cumsum()  # how many sequences have more than t tokens, t falling to 0
    pairs = longer.cumsum()[::-1]  # a sequence of L tokens has L - t pairs at distance t
    distance = np.arange(len(pairs))
    figure = Figure(figsize=(4.5 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for layer, (left, curve) in enumerate(zip(panels, curves, strict=True), 1):
        left.set(title=f"layer {layer}", xlabel="distance (tokens back)")
        right = left.twinx()
        right.bar(distance, pairs, width=1.0, color="0.9", log=True)
        right.set_ylabel("pairs in training", color="0.6")
        left.set_zorder(right.get_zorder() + 1)
        left.patch.set_visible(False)
        left.axhline(0, color="0.5", linewidth=0.8)
        for head, line in enumerate(curve[:, : len(pairs)].cpu().numpy(), 1):
            left.plot(distance, line, marker=".", label=f"head {head}")
        left.set_ylabel("ln theta, less that at distance 0")
        if len(curve) > 1:
            left.legend()
    _save(figure, path)


def plot_comparison(report: dict[str, Any], metric: str, path: Path) -> None:
    """Bars with 95% intervals: one panel a protocol, one bar a model and score.

    report: {protocol: {"runs": [summary, ...]}}, as `cafe compare --json` prints it.
    """
    figure = Figure(figsize=(4.5 * len(report), 3.6), layout="constrained")
    for panel, (protocol, part) in enumerate(report.items(), 1):
        bars: list[tuple[str, dict[str, Any]]] = []
        for summary in part["runs"]:
            name = summary["label"]
            if "item_score" in summary and summary["score"] != "item":
                bars += [(f"{name}, joint", summary), (f"{name}, item", summary["item_score"])]
            else:
                bars.append((name, summary))
        values = [bar["metrics"][metric] for _, bar in bars]
        errors = _errors(values, [bar["ci"][metric] for _, bar in bars])
        axes = figure.add_subplot(1, len(report), panel, title=protocol, xlabel=metric.upper())
        colors = ["tab:blue" if name.endswith(", joint") else "tab:gray" for name, _ in bars]
        axes.barh(range(len(bars)), values, xerr=errors, color=colors, error_kw={"capsize": 3})
        axes.set_yticks(range(len(bars)), [name.replace("$", r"\$") for name, _ in bars])
        axes.invert_yaxis()
    _save(figure, path)


def _errors(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    return [
        [v - low for v, (low, _) in zip(values, intervals, strict=True)],
        [high - v for v, (_, high) in zip(values, intervals, strict=True)],
    ]


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_atomically({path: [buffer.getvalue()]})
