"""One self-contained page about trained runs: tables with intervals, the paper's figures, learning curves, configuration, environment.

Runs are grouped by dataset and system; a system's seeds are averaged. The page asks for nothing outside of itself and runs no script: its
pictures are inlined, and lie beside it as PNG. docs/reports.md says how each figure is made.
"""

import base64
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure

from cafe import plots
from cafe.candidates import PAIRED_INTENTS
from cafe.checkpoint import read_state
from cafe.config import Config
from cafe.config import Model as Kind
from cafe.data.dataset import Dataset
from cafe.data.folders import write_atomically
from cafe.doctor import processor, version
from cafe.evaluation import Evaluation, compare
from cafe.experiment import possible_protocols, ranked, read_names, slug
from cafe.metrics import bootstrap_means, interval
from cafe.runs import dataset_of, load_run, read_run
from cafe.tables import SHOWN

PAGE = "index.html"
PICTURE = re.compile(r"(ranking|sparsity|attention|embeddings|theta|curves)-[0-9]+\.png")
MADE_BY = b'<meta name="generator" content="cafe report">'
BY = {"train_frequency": "times the answer is in training", "history_length": "items in the history"}
PACKAGES = ("cafe-kernels", "torch", "numpy", "triton", "polars", "matplotlib", "scikit-learn")
TEMPLATE = Path(__file__).with_name("report.html")
ATTENTION_USERS = 2000  # a sample of histories is enough for a mean map


@dataclass
class System:
    """One configuration on one dataset, over its seeds."""

    name: str
    config: Config
    runs: dict[int, Path] = field(default_factory=dict)  # by seed


@dataclass
class Group:
    """The systems of one dataset."""

    name: str
    data: Path
    dataset: Dataset
    systems: list[System]
    baseline: str
    ranked: dict[str, dict[str, list[Evaluation]]] = field(default_factory=dict)  # protocol, system -> its seeds

    @property
    def min_count(self) -> int:
        """k, by which the data was prepared."""
        return int(self.dataset.preparation.get("options", {}).get("min_item_count", 1))


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    data: Sequence[str | Path] = (),
    baseline: str | None = None,
    protocols: Sequence[str] = ("aligned", "full", "authors"),
    split: str = "test",
    progress: Callable[[str], None] = lambda step: None,
) -> list[str]:
    """Writes OUT/index.html and its figures as PNG.

    Args:
        runs: run folders, folders of `cafe compare --config`, or other folders of runs. A run's system is the name of its folder without
            its seed (SYSTEM-SEED); evaluations that are missing are computed and kept in the run folders.
        out: made if it is not there; the page and pictures of an earlier report are replaced once the new ones are complete.
        data: prepared datasets, where they are not where the runs were trained.
        baseline: the system whom gains are over; by default the experiment's, or the first SASRec, or the first.
        protocols: of cafe.evaluate. `split`: test or valid.
        progress: called with what is done next.

    Returns:
        What was left out, and why.

    Raises:
        FileNotFoundError, ValueError: nothing to report, not a run, a damaged one, or one whose dataset is elsewhere; says which.

    Example:
        >>> write_report(["runs/table2"], "report")  # doctest: +SKIP
        []
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is not a folder: choose another --out")
    former = (out / PAGE).read_bytes() if (out / PAGE).exists() else MADE_BY
    if MADE_BY not in former or (out / "config.json").exists():
        raise FileExistsError(f"{out} holds a page or a run that is no report: choose another --out")
    groups, notes = collect([Path(run) for run in runs], [Path(folder) for folder in data], baseline)
    page = Page(notes=notes)
    for group in groups:
        possible = possible_protocols(protocols, group.dataset)
        if len(possible) < len(protocols):
            notes.append(f"authors is left out of {group.name}: its pairing needs {PAIRED_INTENTS} intents")
        for system in group.systems:
            for protocol in possible:
                progress(f"{group.name}: {system.name}, {protocol}")
                seeds = [ranked(run, system.name, group.dataset, protocol, split) for run in system.runs.values()]
                group.ranked.setdefault(protocol, {})[system.name] = seeds
    for group in groups:
        _ranking(page, group)
    progress("gains by sparsity, attention, embeddings, masks")
    _sparsity(page, groups)
    _attention(page, groups)
    _embeddings(page, groups)
    _theta(page, groups)
    progress("learning curves and configuration")
    for group in groups:
        _curves(page, group)
        _configuration(page, group)
    _environment(page, groups, split)
    out.mkdir(parents=True, exist_ok=True)
    contents = page.pictures | {PAGE: page.html().encode("utf-8", "replace")}
    write_atomically({out / name: [content] for name, content in contents.items()})
    for picture in out.glob("*.png"):
        if PICTURE.fullmatch(picture.name) and picture.name not in contents:
            picture.unlink()
    return page.notes


def collect(folders: Sequence[Path], data: Sequence[Path], baseline: str | None) -> tuple[list[Group], list[str]]:
    """The runs of the folders by dataset and system, and notes on those that are left out."""
    datasets = {dataset.fingerprint: (path, dataset) for path in data for dataset in [Dataset.load(path)]}
    groups: dict[str, Group] = {}
    notes: list[str] = []
    for folder in folders:
        names, wanted = read_names(folder)
        for run in _runs_in(folder):
            if not (run / "best.safetensors").exists() and run != folder:
                notes.append(f"{run} is left out: it has no trained model yet")
                continue
            if (run / "last.safetensors").exists() and not read_state(run / "last.safetensors").get("done"):
                notes.append(f"{run} is not finished: what is shown is its best model so far")
            meta = read_run(run)
            config, fingerprint = Config(**meta["config"]), meta["fingerprint"]
            if fingerprint not in datasets:
                dataset = dataset_of(run, meta)
                datasets[fingerprint] = Path(meta["data"]), dataset
            path, dataset = datasets[fingerprint]
            name = run.name.removesuffix(f"-{config.seed}") or run.name
            name = names.get(name, name)
            group = groups.setdefault(fingerprint, Group(path.name, path, dataset, [], ""))
            group.baseline = group.baseline or wanted
            unseeded = asdict(config) | {"seed": 0}
            same = [system for system in group.systems if asdict(system.config) | {"seed": 0} == unseeded]
            if same and config.seed in same[0].runs:
                notes.append(f"{run} is left out: {same[0].runs[config.seed]} has the same configuration and seed")
            elif same and same[0].name == name:
                same[0].runs[config.seed] = run
            else:
                if any(system.name == name for system in group.systems):
                    name = f"{name} ({run})"
                group.systems.append(System(name, config, {config.seed: run}))
    if not groups:
        raise ValueError(f"no trained run in {', '.join(map(str, folders)) or 'nothing'}: give run folders with --runs")
    for group in groups.values():
        if [other.name for other in groups.values()].count(group.name) > 1:
            group.name = str(group.data)
        listed = [system.name for system in group.systems]
        if baseline is not None and baseline not in listed:
            raise ValueError(f"--baseline {baseline!r}: {group.name} has the systems {', '.join(listed)}")
        plain = [system.name for system in group.systems if system.config.model == "sasrec"]
        group.baseline = baseline or (group.baseline if group.baseline in listed else [*plain, *listed][0])
    return sorted(groups.values(), key=lambda group: group.min_count), notes


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it: in the order of the experiment, or of Table 2."""
    if (folder / "config.json").exists() or not folder.is_dir():
        return [folder]  # what is not a run is refused by its name later
    order = [slug(name) for name in read_names(folder)[0].values()]
    found = []
    for run in sorted(path.parent for path in folder.glob("*/config.json")):
        config = read_run(run)["config"]
        name = run.name.removesuffix(f"-{config['seed']}")
        place = order.index(name) if name in order else len(order) + get_args(Kind).index(config["model"])
        found.append((place, name, config["seed"], run))
    if not found:
        raise FileNotFoundError(f"{folder} is no run and holds none (no config.json): give run folders with --runs")
    return [run for *_, run in sorted(found)]


class Page:
    """The parts of the page so far."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.pictures = notes, dict[str, bytes]()
        self.parts, self.contents = list[str](), list[str]()

    def heading(self, title: str) -> None:
        self.contents.append(f'<li><a href="#s{len(self.contents)}">{escape(title)}</a></li>')
        self.parts.append(f'<h2 id="s{len(self.contents) - 1}">{escape(title)}</h2>')

    def text(self, text: str, kind: str = "") -> None:
        self.parts.append(f'<p class="{kind}">{escape(text)}</p>')

    def left_out(self, what: str, why: object) -> None:
        self.notes.append(f"{what} is left out: {why}")
        self.text(self.notes[-1], "note")

    def table(
        self, head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any, kind: str = "", left: int = 1
    ) -> None:
        """Cells and the caption are text or (text, small print). The first `left` columns are not numbers."""

        def marked(content: Any) -> str:
            text, small = content if isinstance(content, tuple) else (content, "")
            return escape(str(text)) + (f"<small>{escape(str(small))}</small>" if small else "")

        def cell(content: Any, number: int, tag: str) -> str:
            where = ' class="l"' if number < left else ""
            return f"<{tag}{where}>{marked(content)}</{tag}>"

        lines = [
            "<tr>" + "".join(cell(content, number, tag) for number, content in enumerate(row)) + "</tr>"
            for tag, row in [("th", head), *(("td", row) for row in rows)]
        ]
        self.parts.append(
            f'<div class="scroll {kind}" tabindex="0"><table><caption>{marked(caption)}</caption><thead>{lines[0]}</thead>'
            f"<tbody>{''.join(lines[1:])}</tbody></table></div>"
        )

    def figures(self, kind: str, figures: Sequence[tuple[str, Figure]], caption: str) -> None:
        """Pictures side by side as the width allows, each with what it shows in words."""
        images = []
        for words, figure in figures:
            name = f"{kind}-{1 + sum(name.startswith(f'{kind}-') for name in self.pictures)}.png"
            self.pictures[name] = plots.png(figure)
            text = base64.b64encode(self.pictures[name]).decode()
            images.append(f'<img src="data:image/png;base64,{text}" alt="{escape(words)}">')
        self.parts.append(
            f'<figure><div class="pictures">{"".join(images)}</div><figcaption>{escape(caption)}</figcaption></figure>'
        )

    def html(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return Template(TEMPLATE.read_text()).substitute(
            made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            notes=f'<ul class="note">{notes}</ul>' if notes else "",
            contents="".join(self.contents),
            body="\n".join(self.parts),
        )


def _ranking(page: Page, group: Group) -> None:
    stats = group.dataset.stats()
    page.heading(f"Ranking: {group.name}")
    page.text(
        f"{stats['items']:,} items (minimum count {group.min_count}), {stats['intents']:,} intents, {stats['sequences']:,} users, "
        f"{stats['interactions']:,} interactions, {stats['interactions_per_item']:.1f} an item. Gains are over {group.baseline}."
    )
    bars = []
    for protocol, systems in group.ranked.items():
        first = next(iter(systems.values()))[0]
        artefact = protocol == "authors"
        rows = [(name, score) for name, seeds in systems.items() for score in seeds[0].scores]
        bands = _bands(
            {(*row, metric): systems[row[0]] for row in rows for metric in SHOWN},
            lambda key, one: one.values(key[2], key[1]),
        )
        base, lines = systems[group.baseline], []
        several = any(len(seeds) > 1 for seeds in systems.values())
        for name, score in rows:
            seeds = systems[name]
            cells = []
            for metric in SHOWN:
                value, low, high = bands[name, score, metric]
                means = [one.mean(metric, score) for one in seeds]
                spread = f"\nsd {np.std(means, ddof=1):.4f}" if len(seeds) > 1 else ""
                cells.append((f"{value:.4f}", f"[{low:.4f}, {high:.4f}]{spread}"))
            gain = compare(seeds, base, SHOWN[0], score)
            apart = name == group.baseline and score == base[0].headline
            of = (f"{score} score" if len(seeds[0].scores) > 1 else "") + (
                f"\n{len(seeds)} seed{'s' * (len(seeds) > 1)}" if several else ""
            )
            lines.append([(name, of.strip()), *cells, "" if apart else _gain(gain)])
        page.table(
            ["system", *(metric.upper() for metric in SHOWN), f"{SHOWN[0].upper()} gain"],
            lines,
            (
                f"{protocol}{': an artefact, no measure of quality' if artefact else ''}",
                f"{len(first.users):,} users, {first.split}, ranked against {first.against}. [95% interval over users]"
                f"{', sd: standard deviation over seeds' if several else ''}",
            ),
            "artefact" if artefact else "",
        )
        named = {
            f"{name}, {score}" if len(systems[name][0].scores) > 1 else name: bands[name, score, SHOWN[0]]
            for name, score in rows
        }
        title = f"{group.name}, {protocol}{' (artefact)' if artefact else ''}"
        bars.append((f"{SHOWN[0].upper()} of the systems, {title}", plots.comparison_figure(named, SHOWN[0], title)))
    page.figures(
        "ranking",
        bars,
        "The ranking protocols side by side, with 95% intervals over users. Where a system models intents, blue is the joint score of item "
        "and intent. What shows under authors alone is the artefact of giving each negative an intent that is not the answer's.",
    )
    for by, words in BY.items():
        _breakdown(page, group, by, words)


def _breakdown(page: Page, group: Group, by: str, words: str) -> None:
    pictures = []
    for protocol, systems in group.ranked.items():
        if protocol == "authors":
            continue
        buckets = next(iter(systems.values()))[0].buckets(by)
        members = [(bucket, who) for bucket, who in buckets.items() if who.any()]
        parts = [_bands(systems, lambda name, one, who=who: one.values("ndcg@10")[who]) for _, who in members]
        lines = {name: [part[name] for part in parts] for name in systems}
        head: list[Any] = ["system", *((bucket, f"{who.sum():,} users") for bucket, who in members)]
        page.table(
            head,
            [
                [name, *((f"{mean:.4f}", f"[{low:.4f}, {high:.4f}]") for mean, low, high in line)]
                for name, line in lines.items()
            ],
            f"NDCG@10 by {words}, {protocol}",
        )
        ticks = [f"{bucket}\nn={who.sum():,}" for bucket, who in members]
        figure = plots.points_figure(lines, ticks, title=f"{group.name}, {protocol}", xlabel=words, ylabel="NDCG@10")
        pictures.append((f"NDCG@10 by {words}, {protocol}", figure))
    if pictures:
        caption = f"NDCG@10 by {words}, with 95% intervals over the users of a bucket."
        page.figures(by.replace("_", "-"), pictures, caption)


def _bands(wanted: Mapping[Any, Sequence[Evaluation]], values: Callable[..., np.ndarray]) -> dict[Any, plots.Band]:
    """For each key the mean over users of its seeds' mean `values(key, evaluation)`, and its interval; one bootstrap for all."""
    table = np.stack([np.mean([values(key, one) for one in seeds], axis=0) for key, seeds in wanted.items()], axis=1)
    low, high = interval(bootstrap_means(table))
    return {key: (float(table[:, i].mean()), float(low[i]), float(high[i])) for i, key in enumerate(wanted)}


def _gain(gain: dict[str, Any]) -> tuple[str, str] | str:
    if gain["ratio"] is None:
        return "–"
    if gain["ratio_ci"] is None:
        return f"{gain['ratio'] - 1:+.1%}", "no interval: too near 0"
    low, high = (bound - 1 for bound in gain["ratio_ci"])
    return f"{gain['ratio'] - 1:+.1%}", f"[{low:+.1%}, {high:+.1%}]\np {gain['p']:.3f}"


def _sparsity(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Gain against sparsity (Figure 4)")
    first = groups[0]
    shared = [s.name for s in first.systems if all(s.name in {t.name for t in other.systems} for other in groups)]
    others = [name for name in shared if name != first.baseline]
    if len(groups) < 2 or {group.baseline for group in groups} != {first.baseline} or not others:
        return page.left_out(
            "Figure 4",
            "it needs the same systems and baseline on two or more datasets, as prepared with several --min-item-count (docs/reports.md)",
        )
    ticks, pictures = [f"{group.name}\nk={group.min_count}" for group in groups], []
    for protocol in first.ranked:
        lines = {
            name: [_percent(g.ranked[protocol][name], g.ranked[protocol][g.baseline]) for g in groups]
            for name in others
        }
        title = f"{protocol}{' (artefact)' if protocol == 'authors' else ''}"
        labels = {"title": title, "xlabel": "minimum item count k", "ylabel": f"gain in {SHOWN[0].upper()}, %"}
        figure = plots.points_figure(lines, ticks, **labels)
        pictures.append((f"Gain over {first.baseline} by minimum item count, {title}", figure))
    page.figures(
        "sparsity",
        pictures,
        f"Relative gain over {first.baseline} by minimum item count, 95% intervals over users. "
        "A gain over next to nothing has no interval and is not drawn.",
    )


def _percent(seeds: Sequence[Evaluation], base: Sequence[Evaluation]) -> plots.Band:
    gain = compare(seeds, base, SHOWN[0])
    low, high = gain["ratio_ci"] or (np.nan, np.nan)
    value = gain["ratio"] if gain["ratio_ci"] else np.nan
    return 100 * (value - 1), 100 * (low - 1), 100 * (high - 1)


def _shown(group: Group) -> list[System]:
    """Of the paper's kinds one each: a plain self-attentive model (the paper shows BERT4Rec), and CAFE."""
    kinds = {system.config.model: system for system in reversed(group.systems)}  # the first of its kind stays
    plain = next((kinds[kind] for kind in ("bert4rec", "sasrec") if kind in kinds), None)
    shown = [system for system in (plain, kinds.get("cafe")) if system is not None]
    return shown or [system for system in group.systems if system.config.model != "poprec"][:1]


def _model(group: Group, system: System) -> Any:
    return load_run(next(iter(system.runs.values())), group.dataset)[0]


def _attention(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Attention (Figures 2a, 2b)")
    pictures = []
    for number in range(2):  # the sets side by side
        for group in groups:
            system = next(iter(_shown(group)[number:]), None)
            if system is None:
                continue
            histories = group.dataset.holdout("test").histories
            sample = np.random.default_rng(0).permutation(len(histories))[:ATTENTION_USERS]
            title = f"{plots.shorten(system.name)}, {group.name} (k={group.min_count})"
            weights = plots.mean_attention(_model(group, system), histories.take(np.sort(sample)))
            pictures.append((f"Mean attention map of {title}", plots.attention_figure(weights, title)))
    if not pictures:
        return page.left_out("The attention map", "no run has attention")
    page.figures(
        "attention",
        pictures,
        f"Weights of the first layer of the item encoder, the mean over heads and up to {ATTENTION_USERS:,} test histories "
        "(first seed); the first 20 of the tokens read, from the oldest on. Grey: no history is so "
        "long. Even attention to the past alone has a mean distance of 4.8.",
    )


def _embeddings(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Item embeddings (Figures 2c, 2d)")
    pictures, rows = [], []
    for group in groups:
        counts, ids, intents = group.dataset.train_counts(), group.dataset.item_ids, group.dataset.intent_ids
        for number, system in enumerate(_shown(group)):
            what = f"{plots.shorten(system.name)}, {group.name}"
            try:
                points = plots.embed_items(_model(group, system), group.dataset)
            except ValueError as reason:
                page.left_out(f"The map of embeddings of {what}", reason)
                continue
            for frequent, kind in ((True, "most"), (False, "least")):
                title = f"{what}: {kind} frequent"
                figure = plots.embedding_figure(points, [str(name) for name in intents], frequent, title)
                pictures.append((f"t-SNE of item embeddings, {title}", figure))
            for intent in dict.fromkeys(points.intent) if number == 0 else ():
                cells = []
                for frequent in (True, False):
                    items = points.items[(points.intent == intent) & (points.frequent == frequent)]
                    ends = f"{counts[items].min()} to {counts[items].max()} times"
                    cells.append((len(items), f"{ends}, as {ids[int(items[-1 if frequent else 0])]}"))
                rows.append(
                    [intents[int(intent)], group.name, int((group.dataset.item_intent == intent).sum()), *cells]
                )
    if pictures:
        page.figures(
            "embeddings",
            pictures,
            "The most and the least frequent items (up to 500) of the three largest intents, by one t-SNE of both. Judge clusters by the "
            "silhouette of the embeddings themselves (cosine; 1 apart, 0 mixed), not by eye.",
        )
        head = ["intent", "dataset", "items", "most frequent", "least frequent"]
        page.table(head, rows, "The items shown, and how often training has them", left=2)


def _theta(page: Page, groups: Sequence[Group]) -> None:
    page.heading("Distance masks (theta)")
    pictures = []
    for group in groups:
        for system in group.systems:
            if system.config.model == "poprec":
                continue
            model, config = _model(group, system), system.config
            lengths = np.minimum(np.maximum(group.dataset.train().lengths - 1, 0), config.max_len)
            for path, part in plots.learned_masks(model).items():  # "item_encoder.blocks.0.attention"
                encoder, _, layer, _ = path.split(".")
                which = f"{encoder.replace('_', ' ')}, layer {int(layer) + 1}"
                title = f"{plots.shorten(system.name)}, {group.name}\n{which}"
                figure = plots.theta_figure(part.theta_curves(), lengths, part.causal, title)
                pictures.append((f"theta of {title}", figure))
    if not pictures:
        return page.left_out("The theta curves", "no run has a distance mask")
    page.figures(
        "theta",
        pictures,
        "The learned mask of each layer and head (first seed): 0 leaves a distance's weight as it is, -1 divides it by e. Where training "
        "has few pairs of tokens (bars), a curve is still near where it began.",
    )


def _curves(page: Page, group: Group) -> None:
    page.heading(f"Learning curves: {group.name}")
    Curves = dict[str, list[list[tuple[float, float]]]]
    rows: list[list[Any]] = []
    loss, valid = Curves(), Curves()
    for system in group.systems:
        for seed, run in system.runs.items():
            lines = plots.read_metrics(run) if (run / "metrics.jsonl").exists() else []
            ranked_lines = [line for line in lines if "valid" in line]
            if not ranked_lines:
                page.left_out(f"The learning curve of {run}", "it has no validation in metrics.jsonl")
                continue
            score = [(line["epoch"] + 1, line["valid"]["ndcg@10"]) for line in ranked_lines]
            valid.setdefault(system.name, []).append(score)
            speed = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
            losses = loss.setdefault(system.name, [])  # empty for PopRec, so that colours agree
            if speed:
                losses.append([(line["epoch"] + 1, line["loss"]) for line in lines])
            best = max(score, key=lambda point: point[1])
            pace = f"{np.median(speed):,.0f}" if speed else ""
            rows.append([system.name, seed, len(lines), best[0], f"{best[1]:.4f}", pace, str(run)])
    labels = {"validation NDCG@10": valid, "training loss": loss}
    pictures = [
        (f"{words} by epoch, {group.name}", plots.curves_figure(lines, title=group.name, ylabel=words))
        for words, lines in labels.items()
        if any(lines.values())
    ]
    if pictures:
        page.figures(
            "curves", pictures, "One line a seed. Losses of different kinds (cloze, sampled, joint) do not compare."
        )
        head = ["system", "seed", "epochs", "best epoch", "validation NDCG@10", "tokens/s", "run"]
        page.table(head, rows, f"The runs on {group.name}")


def _configuration(page: Page, group: Group) -> None:
    page.heading(f"Configuration: {group.name}")
    configs = {system.name: asdict(system.config) for system in group.systems}
    options = [name for name in next(iter(configs.values())) if name != "seed"]
    differ = [name for name in options if len({repr(config[name]) for config in configs.values()}) > 1]
    if differ:
        rows = [[name, *(config[name] for config in configs.values())] for name in differ]
        page.table(["option", *configs], rows, "Options in which the systems differ")
    first = next(iter(configs.values()))
    rest = [[name, first[name]] for name in options if name not in differ]
    page.parts.append("<details><summary>Options that are the same for all</summary>")
    page.table(["option", "value"], rest, "")
    page.parts.append("</details><details><summary>How the data was prepared</summary>")
    page.parts.append(f"<pre>{escape(json.dumps(group.dataset.preparation, indent=2, default=str))}</pre></details>")


def _environment(page: Page, groups: Sequence[Group], split: str) -> None:
    page.heading("Environment")
    torches = sorted({read_run(run)["torch"] for group in groups for s in group.systems for run in s.runs.values()})
    rows = [
        *([name, version(name) or "not installed"] for name in PACKAGES),
        ["python", platform.python_version()],
        ["torch of the trainings", ", ".join(torches)],
        ["processor", f"{processor()}, {os.cpu_count()} cores"],
        ["system", f"{platform.system()} {platform.machine()}"],
        ["data", ", ".join(str(group.data) for group in groups)],
        ["split ranked", split],
    ]
    page.table(["what", "version"], rows, "Of the machine that wrote this page", left=2)
