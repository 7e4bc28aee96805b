"""Writes the tables of benchmarks/README.md from results/*.json, between its markers; the text around them is written by hand.

    python -m benchmarks.report            # in place
    python -m benchmarks.report --check    # only say whether the page is as it would be written: exits with 1 if not

A marker is `<!-- report: NAME -->`, and the table ends at `<!-- end of report -->`; the names are those of SECTIONS. A figure that no file
has is "not measured". Targets are those of the project's design; `met` is computed here, and what is missed is bold.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.common import RESULTS, read

README = Path(__file__).with_name("README.md")
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


def times_shorter(data: str) -> Callable[[Results], float | None]:
    """CPU seconds of RecTools' best contestant to its best value, over those of our fastest to the same."""

    def value(results: Results) -> float | None:
        from benchmarks.peers.end_to_end import OURS, final, reference, seconds_to

        curves = find(results, f"end_to_end_{data}", "curves")
        theirs = reference(curves) if curves else None
        if curves is None or theirs is None:
            return None
        goal = final(curves[theirs])
        reached = [seconds_to(curve, goal) for name, curve in curves.items() if name.startswith(OURS)]
        base = seconds_to(curves[theirs], goal)
        fastest = min((seconds for seconds in reached if seconds is not None), default=None)
        return None if fastest is None or base is None else base / fastest

    return value


@dataclass(frozen=True)
class Target:
    what: str
    value: Callable[[Results], float | None]
    sign: str  # ">=" or "<="
    bound: float
    unit: str = "x"

    def row(self, results: Results) -> str:
        value = self.value(results)
        if value is None:
            return f"| {self.what} | not measured | {self.sign} {self.bound:g}{self.unit} | - |"
        target = self.sign, self.bound
        met = "yes" if is_met(value, *target) else "**no**"
        return f"| {self.what} | {cell(value, target, self.unit)} | {self.sign} {self.bound:g}{self.unit} | {met} |"


def ratio(*path: str) -> Callable[[Results], Any]:
    return lambda results: find(results, *path)


def scaled(value: Callable[[Results], float | None], factor: float) -> Callable[[Results], float | None]:
    return lambda results: None if (found := value(results)) is None else found * factor


def excess(results: Results) -> float | None:
    """Peak memory of training simulated Tmall over its limit."""
    found = find(results, "at_scale_stages", "presets", "tmall", "train")
    return found and found["peak_bytes"] / found["limit_bytes"]


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
    Target("top-10 by the item score, the same: torch matmul + topk / ours", at(TOPK, "trained", "item", 256, TORCH), ">=", 5),
    Target("the same: faiss flat / ours", at(TOPK, "trained", "item", 256, FAISS), ">=", 5),
    Target("prepare, 14.5M rows", ratio("at_scale_stages", "presets", "tmall", "prepare", "seconds"), "<=", 60, " s"),
    Target("its peak memory", scaled(ratio("at_scale_stages", "presets", "tmall", "prepare", "peak_bytes"), 1e-9), "<=", 4, " GB"),
    Target("training simulated Tmall, d = 128: peak memory / (1.15 (table + two moments) + 1 GB)", excess, "<=", 1),
    Target("CPU time to RecTools' final full NDCG@10, beauty-sparse: RecTools / ours", times_shorter("beauty-sparse"), ">=", 10),
    Target("the same, beauty", times_shorter("beauty"), ">=", 10),
]  # fmt: skip


def eager_loss(case: str) -> list[Callable[[Results], Any]]:
    """Of the eager loss, at both catalogs."""
    return [ratio("losses", "cases", f"{case}, {v}", "ratios", "eager, sparse") for v in ("V=10k", "V=1.91M")]


def optimizer_growth(mode: str) -> Callable[[Results], float | None]:
    """A step at V = 1.91M over one at V = 10k."""

    def value(results: Results) -> float | None:
        medians = find(results, "optim", "cases", "growth, cold", "median_seconds")
        return medians and medians[f"V=1910000, float32, {mode}"] / medians[f"V=10000, float32, {mode}"]

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
        return "-"
    shown = f"{value:.3g}{unit}"
    return shown if target is None or is_met(value, *target) else f"**{shown}**"


def targets(results: Results) -> str:
    head = ["| what | measured | target | met |", "|---|--:|--:|:-:|"]
    return "\n".join([*head, *(target.row(results) for target in TARGETS)])


def ops(results: Results) -> str:
    lines = ["| what | peer / ours | target |", "|---|--:|--:|"]
    for what, values, target in OTHERS:
        cells = [cell(value(results), target) for value in values]
        lines.append(f"| {what} | {' / '.join(cells)} | {'-' if target is None else '{} {:g}'.format(*target)} |")
    return "\n".join(lines)


def steps(results: Results) -> str:
    lines = ["| items | ms a step | x the smallest | waiting for the batch |", "|--:|--:|--:|--:|"]
    for size, found in (find(results, "at_scale_steps", "sizes") or {}).items():
        lines.append(
            f"| {int(size):,} | {1e3 * found['median_seconds']:.0f} | {found['ratio_to_smallest']:.2f} | {found['share_waiting']:.1%} |"
        )
    return "\n".join(lines)


def stages(results: Results) -> str:
    lines = ["| simulated | stage | seconds | peak memory, GB |", "|---|---|--:|--:|"]
    for preset, found in (find(results, "at_scale_stages", "presets") or {}).items():
        for stage, cost in found.items():
            limit = f" (target {cost['limit_bytes'] / 1e9:.2f})" if "limit_bytes" in cost else ""
            lines.append(f"| {preset} | {stage} | {cost['seconds']:.0f} | {cost['peak_bytes'] / 1e9:.2f}{limit} |")
    return "\n".join(lines)


def end_to_end(results: Results) -> str:
    from benchmarks.peers.end_to_end import summary

    parts = []
    for stem, record in results.items():
        if stem.startswith("end_to_end_"):
            load = ", ".join(f"{x:.1f}" for x in record["load_average_at_start"])
            parts.append(
                f"{record['data']}, {record['users']:,} users, {record['threads']} thread each, load averages at its start {load}:\n\n"
                f"{summary(record)}\n\n![NDCG@10 over CPU seconds](results/{stem}.png)"
            )
    return "\n\n".join(parts) or "Not measured yet."


def peers(results: Results) -> str:
    lines = ["| peer's file | case | contestant | ms | x ours |", "|---|---|---|--:|--:|"]
    for stem in ("peers_sampler", "peers_optimizers", "peers_search"):
        record = results.get(stem, {})
        cases = record.get("cases", {})
        if stem == "peers_sampler":
            cases = {f"{v}, {what}": case for v, found in cases.items() for what, case in found.items()}
        for case, found in cases.items():
            medians = found["median_seconds"]
            ours = next(seconds for name, seconds in medians.items() if name.startswith(tuple(record["ours"])))
            for name, seconds in medians.items():
                lines.append(f"| {stem} | {case} | {name} | {1e3 * seconds:.3g} | {seconds / ours:.3g} |")
    return "\n".join(lines)


def exponents(results: Results) -> str:
    record = results.get("growth")
    return "Not measured yet." if record is None else growth.table(record)


def files(results: Results) -> str:
    lines = ["| file | machine | versions | threads | load average |", "|---|---|---|--:|---|"]
    for stem, record in sorted(results.items()):
        on, load = record["machine"], record["machine"]["load_average"]
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        shown = "not recorded" if load is None else ", ".join(f"{x:.1f}" for x in load)
        lines.append(
            f"| {stem} | {on['cpu']}, {on['cores']} cores, {on['system']} | {versions} | {record.get('threads', '-')} | {shown} |"
        )
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
