"""The pictures: learning curves, distance masks, runs compared, and the paper's Figures 2 and 4. One figure has one panel."""

import io
import json
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from cafe.data.dataset import Dataset, Sequences
from cafe.data.folders import write_atomically
from cafe_kernels import DistanceMaskedAttention
from cafe_kernels.attention.reference import attention_weights

SIZE = (4.6, 3.3)  # inches: its text can be read on a phone
COLORS = tuple(
    f"tab:{c}" for c in ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
)
LARGEST_INTENTS = 3  # of Figures 2c and 2d
Band = tuple[float, float, float]  # a value and its 95% interval


def plot_curve(run: Path) -> None:
    """curve.png of a run folder: training loss and validation NDCG@10 by epoch, from metrics.jsonl."""
    lines = read_metrics(run)
    valid = [line for line in lines if "valid" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot(xlabel="epoch", ylabel="training loss", title=plain(run.name))
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


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run."""
    file = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it, or go on with the run to write it again") from None


def learned_masks(model: nn.Module) -> dict[str, DistanceMaskedAttention]:
    """The attention modules with a distance mask that is learned, and not a fixed window, by name."""
    found = {}
    for name, part in model.named_modules():
        log_theta = part.log_theta() if isinstance(part, DistanceMaskedAttention) else None
        if isinstance(part, DistanceMaskedAttention) and log_theta is not None and bool(log_theta.isfinite().all()):
            found[name] = part
    return found


def plot_theta(curves: Sequence[Tensor], lengths: np.ndarray, path: Path, causal: bool = True) -> None:
    """`draw_theta` of every layer, side by side."""
    figure = Figure(figsize=(4.5 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for layer, (panel, curve) in enumerate(zip(panels, curves, strict=True), 1):
        draw_theta(panel, curve, lengths, causal)
        panel.set_title(f"layer {layer}")
    _save(figure, path)


def draw_theta(left: Axes, curve: Tensor, lengths: np.ndarray, causal: bool = True) -> None:
    """ln theta against distance, one line a head, over how many pairs of tokens training had at a distance.

    Where these are few, a curve is still near the random one it started from.

    curve: (heads, n) of one layer, from DistanceMaskedAttention.theta_curves; without `causal` (heads, 2n - 1).
    lengths: int (B,), of the training sequences, at most n.
    """
    longer = np.bincount(lengths)[:0:-1].cumsum()  # how many sequences have more than t tokens, t falling to 0
    pairs = longer.cumsum()[::-1]  # a sequence of L tokens has L - t pairs at distance t
    middle = 0 if causal else curve.shape[1] // 2
    distance = np.arange(0 if causal else 1 - len(pairs), len(pairs))
    left.set_xlabel("distance (tokens back)")
    right = left.twinx()
    right.bar(distance, pairs[abs(distance)], width=1.0, color="0.9", log=True)
    right.set_ylabel("pairs in training", color="0.4")
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    left.axhline(0, color="0.5", linewidth=0.8)
    for head, line in enumerate(curve[:, middle + distance].cpu().numpy(), 1):
        left.plot(distance, line, marker=".", label=f"head {head}")
    left.set_ylabel("ln theta, less that at distance 0")
    if len(curve) > 1:
        left.legend(fontsize="small", framealpha=0.6)


def plot_comparison(report: dict[str, Any], metric: str, path: Path) -> None:
    """Bars with 95% intervals: one panel a protocol, one bar a model and score.

    report: {protocol: {"runs": [summary, ...]}}, as `cafe compare --json` prints it.
    """
    figure = Figure(figsize=(4.5 * len(report), 3.6), layout="constrained")
    for panel, (protocol, part) in enumerate(report.items(), 1):
        bars: dict[str, Band] = {}
        for summary in part["runs"]:
            scores = {"": summary}
            if "item_score" in summary and summary["score"] != "item":
                scores = {", joint": summary, ", item": summary["item_score"]}
            for score, values in scores.items():
                bars[summary["label"] + score] = (values["metrics"][metric], *values["ci"][metric])
        axes = figure.add_subplot(1, len(report), panel, title=protocol, xlabel=metric.upper())
        draw_bars(axes, bars)
    _save(figure, path)


def draw_bars(axes: Axes, bars: Mapping[str, Band]) -> None:
    """One bar a name, from top to bottom; those of a joint score are blue."""
    values = [value for value, _, _ in bars.values()]
    colors = ["tab:blue" if name.endswith(", joint") else "tab:gray" for name in bars]
    axes.barh(range(len(bars)), values, xerr=_errors(bars.values()), color=colors, error_kw={"capsize": 3})
    axes.set_yticks(range(len(bars)), wrapped(bars))
    axes.invert_yaxis()


def wrapped(names: Iterable[str]) -> list[str]:
    """Names in lines that leave room for the bars."""
    return [textwrap.fill(plain(shorten(name, 60)), 22) for name in names]


def panel(**labels: Any) -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.add_subplot(**{name: plain(text) for name, text in labels.items()})


def comparison_figure(bars: Mapping[str, Band], metric: str, title: str) -> Figure:
    """`draw_bars` as a figure, as high as the bars need."""
    figure, axes = panel(xlabel=metric.upper())
    figure.suptitle(plain(title))
    figure.set_figheight(1.1 + 0.28 * max(sum(name.count("\n") + 1 for name in wrapped(bars)), 3))
    draw_bars(axes, bars)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure


def points_figure(lines: Mapping[str, Sequence[Band]], ticks: Sequence[str], **labels: str) -> Figure:
    """A point with its interval for each name and tick, those of a tick side by side: breakdowns, and Figure 4."""
    figure, axes = panel(**labels)
    spread = min(0.07, 0.6 / len(lines))
    for number, (name, bands) in enumerate(lines.items()):
        x = np.arange(len(ticks)) + (number - (len(lines) - 1) / 2) * spread
        color = COLORS[number % len(COLORS)]
        marker = "os^Dv"[number // len(COLORS) % 5]
        values = [value for value, _, _ in bands]
        axes.errorbar(
            x, values, _errors(bands), color=color, marker=marker, ms=4, lw=1, capsize=2, label=plain(shorten(name))
        )
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    axes.set_xticks(range(len(ticks)), [plain(tick) for tick in ticks])
    axes.grid(axis="y", color="0.9")
    _legend(figure)
    return figure


def curves_figure(runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]], **labels: str) -> Figure:
    """Lines of (epoch, value) points: one colour a system, one line a seed."""
    figure, axes = panel(xlabel="epoch", **labels)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for number, (name, seeds) in enumerate(runs.items()):
        for points in seeds:
            style: dict[str, Any] = {
                "color": COLORS[number % len(COLORS)],
                "ls": ("-", "--", ":")[number // len(COLORS) % 3],
            }
            marker = "." if len(points) < 3 else None
            label = plain(shorten(name)) if points is seeds[0] else None
            axes.plot(*zip(*points, strict=True), marker=marker, lw=1.2, label=label, **style)
    axes.grid(color="0.9")
    _legend(figure)
    return figure


def mean_attention(model: Any, histories: Sequences, steps: int = 20, batch_size: int = 256) -> np.ndarray:
    """Figures 2a and 2b: how much token i of a history attends to token j in the first layer of the item encoder.

    Args:
        model: in eval mode, with an `item_encoder`.
        histories: the newest `max_len` tokens of each are read; token 0 is the oldest of these.

    Returns:
        (steps, steps), the mean over heads and over the histories that have a token i; NaN where none has.
    """
    attention: DistanceMaskedAttention = model.item_encoder.blocks[0].attention
    packed, total, count = attention.packed, torch.zeros(steps, steps), torch.zeros(steps)

    def record(x: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, **options: Any) -> Tensor:
        keys = x if options.get("key_value") is None else options["key_value"]
        values = keys if options.get("value") is None else options["value"]
        q, k, _ = attention._op_inputs(x, keys, values, options.get("positions"))
        log_theta, real = attention.log_theta(), torch.arange(max_seqlen) < cu_seqlens.diff()[:, None]
        weights = attention_weights(q, k, log_theta, cu_seqlens, max_seqlen, attention.scale, attention.causal).mean(1)
        n = min(steps, max_seqlen)
        total[:n, :n] += torch.where(real[:, :, None], weights, 0.0).sum(0)[:n, :n]
        count[:n] += real.sum(0)[:n]
        return packed(x, cu_seqlens, max_seqlen=max_seqlen, **options)

    attention.packed = record  # type: ignore[assignment, method-assign]
    try:
        with torch.inference_mode():
            for start in range(0, len(histories), batch_size):
                rows = histories.take(range(start, min(start + batch_size, len(histories))), last=model.config.max_len)
                model.states(torch.from_numpy(rows.items).long(), torch.from_numpy(rows.indptr).int())
    finally:
        del attention.packed
    return (total / count[:, None]).numpy()


def attention_figure(weights: np.ndarray, title: str) -> Figure:
    """The map of `mean_attention`; the title tells the mean distance in tokens, each row counting alike."""
    place = np.arange(len(weights))
    known = weights[~np.isnan(weights[:, 0])]
    share = known / known.sum(1, keepdims=True)
    far = float((share * abs(place[: len(known), None] - place)).sum(1).mean()) if len(known) else float("nan")
    figure, axes = panel(title=f"{title}\nmean distance {far:.1f} tokens", xlabel="attended token", ylabel="token")
    axes.set_facecolor("0.85")
    image = axes.imshow(weights, cmap="viridis", vmin=0, vmax=0.3)
    axes.set_xticks(place[::5])
    axes.set_yticks(place[::5])
    figure.colorbar(image, ax=axes, extend="max", label="mean weight")
    return figure


class Embedded(NamedTuple):
    """What Figures 2c and 2d show: items of three intents. Fields are (points,) but for `place`."""

    items: np.ndarray
    intent: np.ndarray
    frequent: np.ndarray  # bool
    place: np.ndarray  # (points, 2), of t-SNE
    silhouette: tuple[float, float]  # of the embeddings by intent: of the rare items, of the frequent ones


def embed_items(model: Any, dataset: Dataset, most: int = 500) -> Embedded:
    """Figures 2c and 2d: the embeddings of the `most` most and least frequent items of the three largest intents, by one t-SNE.

    Raises:
        ValueError: scikit-learn is not installed, or there are no three intents of 20 items.
    """
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ModuleNotFoundError:
        raise ValueError('it needs scikit-learn: pip install "cafe-kernels[report]"') from None
    sizes = np.bincount(dataset.item_intent, minlength=LARGEST_INTENTS)
    largest = np.argsort(-sizes, kind="stable")[:LARGEST_INTENTS]
    third = int(sizes[largest[-1]])
    number = min(most, third // 2)
    if number < 10:
        raise ValueError(f"it needs three intents of 20 items or more; the third largest has {third}")
    shown = sorted(largest, key=lambda intent: str(dataset.intent_ids[int(intent)]))  # so that colours stay
    counts, chosen = dataset.train_counts(), []
    for intent in shown:
        members = np.flatnonzero(dataset.item_intent == intent)
        chosen.append(members[np.argsort(counts[members], kind="stable")])
    items = np.concatenate([part for row in chosen for part in (row[:number], row[-number:])])
    frequent = np.tile(np.repeat([False, True], number), LARGEST_INTENTS)
    intent = dataset.item_intent[items]
    with torch.inference_mode():
        vectors = model.embed(torch.from_numpy(items)).float().numpy()
    place = TSNE(init="pca", random_state=0).fit_transform(vectors)
    scores = [float(silhouette_score(vectors[who], intent[who], metric="cosine")) for who in (~frequent, frequent)]
    return Embedded(items, intent, frequent, place, (scores[0], scores[1]))


def embedding_figure(points: Embedded, names: Sequence[str], frequent: bool, title: str) -> Figure:
    """The frequent or the rare items of `embed_items`, on the axes of all."""
    figure, axes = panel(title=f"{title}\nsilhouette by intent {points.silhouette[frequent]:.2f}")
    for color, intent in zip(("tab:blue", "tab:orange", "tab:green"), dict.fromkeys(points.intent), strict=True):
        who = (points.frequent == frequent) & (points.intent == intent)
        x, y = points.place[who].T
        axes.scatter(x, y, s=7, alpha=0.6, lw=0, color=color, label=plain(shorten(names[intent])))
    low, high = points.place.min(0), points.place.max(0)
    edge = 0.05 * (high - low)
    axes.set(
        xlim=(low[0] - edge[0], high[0] + edge[0]), ylim=(low[1] - edge[1], high[1] + edge[1]), xticks=[], yticks=[]
    )
    _legend(figure, markerscale=3)
    return figure


def theta_figure(curve: Tensor, lengths: np.ndarray, causal: bool, title: str) -> Figure:
    """`draw_theta` as a figure."""
    figure, axes = panel(title=title)
    draw_theta(axes, curve, lengths, causal)
    return figure


def plain(text: object) -> str:
    """A name as matplotlib takes it literally: no formula, and shown in a legend."""
    text = str(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def shorten(text: object, most: int = 40) -> str:
    """The end of a long name, where a path of categories tells most."""
    return str(text) if len(str(text)) <= most else f"…{str(text)[1 - most :]}"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is shown as boxes
        figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _legend(figure: Figure, **options: Any) -> None:
    """Below the panel, in as many columns as the names leave room for."""
    longest = max(len(name) for name in figure.axes[0].get_legend_handles_labels()[1])
    columns = 3 if longest < 15 else 2 if longest < 25 else 1
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", frameon=False, **options)


def _errors(bands: Any) -> list[list[float]]:
    return [[value - low for value, low, _ in bands], [high - value for value, _, high in bands]]


def _save(figure: Figure, path: Path) -> None:
    write_atomically({path: [png(figure)]})
