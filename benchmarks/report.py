"""Writes the tables of benchmarks/README.md from results/*.json, between its markers; the text around them is written by hand.

    python -m benchmarks.report            # in place
    python -m benchmarks.report --check    # only say whether the page is as it would be written: exits with 1 if not

A marker is `<!-- report: NAME -->`, and the table ends at `<!-- end of report -->`; the names are those of SECTIONS. A figure that no file
has, or not as a finite number, is "not measured". Targets are those of the project's design; `met` is computed here, and what is missed
is bold.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.common import RESULTS, read

README = Path(__file__).with_name("README.md")
GPU = Path(__file__).parents[1] / "docs" / "gpu.md"
MISSING = "not measured"
INCOMPLETE = (AttributeError, LookupError, OSError, StopIteration, TypeError, ValueError, ZeroDivisionError)
BEGIN, END = "<!-- report: {} -->", "<!-- end of report -->"
Results = dict[str, Any]  # of each file, by its stem

SAMPLER = ("sampler", "cases", "V=1910000 draws=3200", "steady")
ATTENTION = ("attention", "cases", "{}, head width {}, forward + backward", "ratios", "{} / ours")
OPTIM = ("optim", "cases", "V=1910000", "ratios")
TOPK = ("topk", "cases", "{} {} users={}", "ratios", "{} / ours")
TORCH, FAISS, PADDED = "torch matmul + topk", "faiss IndexFlatIP", "best padded peer"
EAGER, BMM, SPEED = "eager, padded", "the products alone (bmm)", ("training", "ratio_to_padded")


def find(results: Results, *path: str) -> Any:
    """The entry at `path`, or None where there is none."""
    found: Any = results
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def at(path: tuple[str, ...], *given: Any) -> Callable[[Results], Any]:
    """`find`, the braces of `path` filled with `given`, in order."""
    filled, left = [], list(given)
    for key in path:
        count = key.count("{}")
        filled.append(key.format(*left[:count]))
        left = left[count:]
    return lambda results: find(results, *filled)


def known(value: Callable[..., Any], *given: Any) -> float | None:
    """The number that `value` finds; None where the record is incomplete, or it is not finite."""
    try:
        found = float(value(*given))
    except INCOMPLETE:
        return None
    return found if math.isfinite(found) else None


def finite(number: float) -> float:
    """`number`, which a complete record has.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(number):
        raise ValueError(f"{number} is no measurement")
    return number


def row(head: Any, cells: Callable[..., Sequence[str]], *given: Any) -> str:
    """A table's row; "not measured" beside its head where the record is incomplete."""
    return f"| {head} | {complete(lambda: ' | '.join(cells(*given)))} |"


def complete(made: Callable[..., str], *given: Any) -> str:
    """What is `made` of a record; "not measured" where the record is incomplete."""
    try:
        return made(*given)
    except INCOMPLETE:
        return MISSING


def entries(results: Results, *path: str) -> dict[str, Any]:
    found = find(results, *path)
    return found if isinstance(found, dict) else {}


def times_shorter(data: str) -> Callable[[Results], float | None]:
    """CPU seconds of RecTools to its contestants' own best values, over ours to the same: the least favourable of them."""

    def value(results: Results) -> float | None:
        from benchmarks.peers.end_to_end import least_favourable

        least = least_favourable(results[f"end_to_end_{data}"]["curves"])
        return None if least is None else least[0]

    return value


def of_gpu(column: str) -> Callable[[Results], float]:
    """The largest figure in a column of the table of the compiled GPU kernels."""
    return lambda results: largest(GPU.read_text(), column)


def largest(page: str, column: str) -> float:
    """The largest number in a column of the Markdown table that has it.

    >>> largest("| a | b B |\\n|---|--:|\\n| x | 1.5 |\\n| y | - |\\n| z | |", "b B")
    1.5
    """
    lines = [[text.strip() for text in line.split("|")] for line in page.splitlines() if line.startswith("|")]
    head = next(cells for cells in lines if column in cells)
    at = head.index(column)
    return max(float(cells[at]) for cells in lines if len(cells) == len(head) and re.fullmatch(r"[\d.]+", cells[at]))


@dataclass(frozen=True)
class Target:
    what: str
    value: Callable[[Results], float | None]
    sign: str  # ">=" or "<="
    bound: float
    unit: str = "x"

    def row(self, results: Results) -> str:
        value = known(self.value, results)
        if value is None:
            return f"| {self.what} | {MISSING} | {self.sign} {self.bound:g}{self.unit} | - |"
        target = self.sign, self.bound
        met = "yes" if is_met(value, *target) else "**no**"
        return f"| {self.what} | {cell(value, target, self.unit)} | {self.sign} {self.bound:g}{self.unit} | {met} |"


def ratio(*path: str) -> Callable[[Results], Any]:
    return lambda results: find(results, *path)


def scaled(value: Callable[[Results], float], factor: float) -> Callable[[Results], float]:
    return lambda results: value(results) * factor


def excess(results: Results) -> float:
    """Peak memory of training on simulated Tmall over its limit."""
    found = results["at_scale_stages"]["presets"]["tmall"]["train"]
    return found["peak_bytes"] / found["limit_bytes"]


def excess_by_hand(results: Results) -> float:
    """The same of simulated Amazon, from the page's table that no file has."""
    peak, limit = re.findall(r"^\| train: .* \| ([\d.]+) \(target ([\d.]+)\) \|$", README.read_text(), re.M)[0]
    return float(peak) / float(limit)


def same_items(score: str) -> Callable[[Results], float]:
    """Percent of the places of the ten best with the same item as every peer's, the worst peer."""
    return lambda results: (
        100 * min(results["topk"]["cases"][f"trained {score} users=256"]["same_item_at_same_place"].values())
    )


TARGETS = [
    Target("sampler, 3,200 draws, V = 1.91M: torch.multinomial / ours", ratio(*SAMPLER, "ratios", "torch.multinomial / ours"), ">=", 50),
    Target(
        "the same: numpy's cumulative search / ours", ratio(*SAMPLER, "ratios", "numpy's faster cumulative search / ours"), ">=", 20
    ),
    Target("the same: ours / a plain random gather of as many", ratio(*SAMPLER, "ratios", "ours / fastest gather"), "<=", 3),
    Target("the same, excluding 50-long histories: with / without", ratio(*SAMPLER, "ratios", "ours excluding / ours"), "<=", 1.6),
    Target("attention, n = 50, forward + backward: eager with the same bias / ours, d = 64", at(ATTENTION, "n=50", 64, EAGER), ">=", 3),
    Target("the same, d = 128", at(ATTENTION, "n=50", 128, EAGER), ">=", 3),
    Target("attention, Beauty's lengths: eager padded / ours, d = 64", at(ATTENTION, "Beauty's lengths", 64, EAGER), ">=", 10),
    Target("the same, d = 128", at(ATTENTION, "Beauty's lengths", 128, EAGER), ">=", 10),
    Target("training on Beauty, tokens/s: SASRec `paper` / padded PyTorch SASRec", ratio(*SPEED, "SASRec paper"), ">=", 10),
    Target("training step: V = 1.91M / V = 10k", ratio("at_scale_steps", "sizes", "1910226", "ratio_to_smallest"), "<=", 1.3),
    Target("optimizer, 9,600 rows of 1.91M x 128: SparseAdam / lazy", ratio(*OPTIM, "SparseAdam / lazy"), ">=", 10),
    Target("the same: dense fused Adam / exact", ratio(*OPTIM, "dense fused Adam / exact"), ">=", 100),
    Target("the same: exact / lazy", ratio(*OPTIM, "exact / lazy"), "<=", 2),
    Target("joint top-10 of 1.91M x 128, 256 users: torch matmul + topk / ours", at(TOPK, "trained", "joint", 256, TORCH), ">=", 5),
    Target("the same: equal to torch's in item and place", same_items("joint"), ">=", 100, "%"),
    Target("top-10 by the item score, the same: torch matmul + topk / ours", at(TOPK, "trained", "item", 256, TORCH), ">=", 5),
    Target("the same: faiss flat, which has no joint score, / ours", at(TOPK, "trained", "item", 256, FAISS), ">=", 5),
    Target("the same: equal to torch's and faiss's in item and place", same_items("item"), ">=", 100, "%"),
    Target("prepare, 14.5M rows", ratio("at_scale_stages", "presets", "tmall", "prepare", "seconds"), "<=", 60, " s"),
    Target("its peak memory", scaled(ratio("at_scale_stages", "presets", "tmall", "prepare", "peak_bytes"), 1e-9), "<=", 4, " GB"),
    Target("training, V = 1.91M, d = 128: peak memory / (1.15 (table + two moments) + 1 GB), `amazon` below", excess_by_hand, "<=", 1),
    Target("the same, simulated Tmall (V = 1.8M)", excess, "<=", 1),
    Target("GPU kernels, sm_80, sm_90, sm_100, gfx942, offline (docs/gpu.md): bytes spilled, the most", of_gpu("spill B"), "<=", 0, " B"),
    Target("the same, attention at d = 64: distinct bytes read and written / floor, the most", of_gpu("distinct"), "<=", 1.1),
    Target("the same: bytes of all loads and stores, before any cache, / floor, the most", of_gpu("issued"), "<=", 1.1),
    Target("CPU time to RecTools' best, beauty-sparse: its least favourable contestant / ours", times_shorter("beauty-sparse"), ">=", 10),
    Target("the same, beauty", times_shorter("beauty"), ">=", 10),
]  # fmt: skip


def eager_loss(case: str) -> list[Callable[[Results], Any]]:
    """Of the eager loss, at both catalogs."""
    return [ratio("losses", "cases", f"{case}, {v}", "ratios", "eager, sparse") for v in ("V=10k", "V=1.91M")]


def optimizer_growth(mode: str) -> Callable[[Results], float]:
    """A step at V = 1.91M over one at V = 10k."""

    def value(results: Results) -> float:
        medians = results["optim"]["cases"]["growth, cold"]["median_seconds"]
        return medians[f"V=1910000, float32, {mode}"] / medians[f"V=10000, float32, {mode}"]

    return value


def over(path: tuple[str, ...], *cases: tuple[Any, ...]) -> list[Callable[[Results], Any]]:
    return [at(path, *case) for case in cases]


OTHERS: list[tuple[str, list[Callable[[Results], Any]], tuple[str, float] | None]] = [  # what, its cells, the target of each
    (
        "attention, forward + backward, n = 50, d = 64 / 128: best padded PyTorch",
        over(ATTENTION, ("n=50", 64, PADDED), ("n=50", 128, PADDED)), None,
    ),
    ("the same, Beauty's lengths", over(ATTENTION, ("Beauty's lengths", 64, PADDED), ("Beauty's lengths", 128, PADDED)), None),
    ("the same, n = 200 / 1024, d = 64", over(ATTENTION, ("n=200", 64, PADDED), ("n=1024", 64, PADDED)), None),
    (
        "its matrix products alone, on whole squares (bmm), n = 50 / 200 / 1024, d = 64",
        over(ATTENTION, ("n=50", 64, BMM), ("n=200", 64, BMM), ("n=1024", 64, BMM)), (">=", 0.5),
    ),
    (
        "training on Beauty, tokens/s: CAFE `paper` / `best`, which do more for each token",
        [ratio(*SPEED, "CAFE paper"), ratio(*SPEED, "CAFE best")], None,
    ),
    ("BCE, K = 1 a token, V = 10k / 1.91M: eager gather and einsum", eager_loss("BCE, K=1 a token"), (">=", 5)),
    ("BCE, K = 128 a token, V = 10k / 1.91M", eager_loss("BCE, K=128 a token"), (">=", 5)),
    ("softmax, K = 128 a token, V = 10k / 1.91M", eager_loss("softmax, K=128 a token"), (">=", 5)),
    (
        "RowSparseAdam, its step at V = 1.91M / at V = 10k, lazy / exact",
        [optimizer_growth("lazy"), optimizer_growth("exact")], ("<=", 1.3),
    ),
    (
        "top-10 by the item score, random table, 256 users: torch / faiss",
        over(TOPK, ("random", "item", 256, TORCH), ("random", "item", 256, FAISS)), (">=", 0.83),
    ),
    (
        "top-10, one user: torch, joint score / item score",
        over(TOPK, ("trained", "joint", 1, TORCH), ("trained", "item", 1, TORCH)), None,
    ),
]  # fmt: skip


def is_met(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def cell(value: float | None, target: tuple[str, float] | None, unit: str = "") -> str:
    """Bold where it misses the target."""
    if value is None:
        return MISSING
    shown = f"{value:.3g}{unit}"
    return shown if target is None or is_met(value, *target) else f"**{shown}**"


def targets(results: Results) -> str:
    head = ["| what | measured | target | met |", "|---|--:|--:|:-:|"]
    return "\n".join([*head, *(target.row(results) for target in TARGETS)])


def ops(results: Results) -> str:
    lines = ["| what | peer / ours | target |", "|---|--:|--:|"]
    for what, values, target in OTHERS:
        cells = [cell(known(value, results), target) for value in values]
        lines.append(f"| {what} | {' / '.join(cells)} | {'-' if target is None else '{} {:g}'.format(*target)} |")
    return "\n".join(lines)


def steps(results: Results) -> str:
    def cells(found: Any) -> list[str]:
        median, growth, waiting = (
            finite(found[key]) for key in ("median_seconds", "ratio_to_smallest", "share_waiting")
        )
        return [f"{1e3 * median:.0f}", f"{growth:.2f}", f"{waiting:.1%}"]

    lines = ["| items | ms a step | x the smallest | waiting for the batch |", "|--:|--:|--:|--:|"]
    sizes = entries(results, "at_scale_steps", "sizes")
    lines += [row(f"{int(size):,}", cells, found) for size, found in sizes.items()]
    return "\n".join(lines) if sizes else MISSING


def stages(results: Results) -> str:
    def cells(cost: Any) -> list[str]:
        limit = f" (target {finite(cost['limit_bytes']) / 1e9:.2f})" if "limit_bytes" in cost else ""
        return [f"{finite(cost['seconds']):.0f}", f"{finite(cost['peak_bytes']) / 1e9:.2f}{limit}"]

    presets = entries(results, "at_scale_stages", "presets")
    lines = [
        row(f"{preset} | {stage}", cells, cost)
        for preset in presets
        for stage, cost in entries(presets, preset).items()
    ]
    head = ["| simulated | stage | seconds | peak memory, GB |", "|---|---|--:|--:|"]
    return "\n".join(head + lines) if lines else MISSING


def end_to_end(results: Results) -> str:
    from benchmarks.peers.end_to_end import summary

    def part(stem: str, record: Any) -> str:
        load = ", ".join(f"{x:.1f}" for x in record["load_average_at_start"])
        return (
            f"{record['data']}, {record['users']:,} users, {record['threads']} thread each, load averages at its start {load}:\n\n"
            f"{summary(record)}\n\n![NDCG@10 over CPU seconds](results/{stem}.png)"
        )

    stems = [stem for stem in results if stem.startswith("end_to_end_")]
    parts = [(stem, complete(part, stem, results[stem])) for stem in stems]
    return "\n\n".join(f"{stem}: {text}" if text == MISSING else text for stem, text in parts) or MISSING


def peers(results: Results) -> str:
    def seconds(stem: str, medians: Any, name: str) -> list[str]:
        base = next(value for other, value in medians.items() if other.startswith(tuple(results[stem]["ours"])))
        return [f"{1e3 * finite(medians[name]):.3g}", f"{finite(medians[name] / base):.3g}"]

    lines = ["| peer's file | case | contestant | ms | x ours |", "|---|---|---|--:|--:|"]
    for stem in ("peers_sampler", "peers_optimizers", "peers_search"):
        cases = entries(results, stem, "cases")
        if stem == "peers_sampler":
            cases = {f"{v}, {what}": case for v in cases for what, case in entries(cases, v).items()}
        for case in cases or [""]:
            medians = entries(cases, case, "median_seconds")
            lines += [row(f"{stem} | {case} | {name}", seconds, stem, medians, name) for name in medians or [""]]
    return "\n".join(lines)


def exponents(results: Results) -> str:
    return complete(lambda: growth.table(results["growth"]))


def files(results: Results) -> str:
    def cells(record: Any) -> list[str]:
        on, load = record["machine"], record["machine"]["load_average"]
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        return [
            f"{on['cpu']}, {on['cores']} cores, {on['system']}", versions, str(record.get("threads", "-")),
            "not recorded" if load is None else ", ".join(f"{x:.1f}" for x in load),
        ]  # fmt: skip

    lines = ["| file | machine | versions | threads | load average |", "|---|---|---|--:|---|"]
    lines += [row(stem, cells, record) for stem, record in sorted(results.items())]
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "targets": targets,
    "ops": ops,
    "steps": steps,
    "stages": stages,
    "end to end": end_to_end,
    "peers": peers,
    "exponents": exponents,
    "files": files,
}


def load(folder: Path = RESULTS) -> Results:
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def written(page: str, results: Results) -> str:
    """`page` with every section between markers as the results have it.

    Raises:
        ValueError: a marker of an unknown section, or one that does not end.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in SECTIONS:
            raise ValueError(f"a marker of {name!r}: expected one of {', '.join(SECTIONS)}")
        return f"{BEGIN.format(name)}\n\n{SECTIONS[name](results)}\n\n{END}"

    pattern = re.compile(
        re.escape(BEGIN).replace(r"\{\}", "([^<>]*?)") + "(?:(?!<!-- report: ).)*?" + re.escape(END), re.S
    )
    page, count = pattern.subn(replace, page)
    if count != page.count(BEGIN.split("{}")[0]):
        raise ValueError(f"a marker without its end, {END!r}, before the next one")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = README.read_text()
    new = written(page, load())
    if parser.parse_args().check:
        print(
            "as it would be written" if page == new else "README.md is not as its results: python -m benchmarks.report"
        )
        raise SystemExit(page != new)
    README.write_text(new)
    print(f"written: {README}")


if __name__ == "__main__":
    main()
