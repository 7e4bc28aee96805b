"""What became slower between two result files, or two folders of them, by more than the noise.

    python -m benchmarks.regressions OLD NEW [--least 0.05] [--strict]

It means something between two runs on the same quiet machine. Of each case in both, each contestant of this library: its median
seconds, new / old, divided by the median of the same quotient of the peers in that case (of the whole file, where the case has none),
since a machine that is slower today is slower for them too. The noise is half the distance of the quartiles, relative to the median, of
the old and the new measurement and of those peers, as the root of the sum of squares; 10% each where a file has no quartiles. A change
beyond both the noise and --least is a regression, or as much a gain.

Of "steady" and "after_another" timings only the steady ones count; lists, of an op over several sizes, do not. What is in one of the
two only is printed, and so is where the processor, the threads or the versions differ. Compared are the files of the ops, the training
step, its growth with the catalog and the peers; growth, distributed, end_to_end_* and at_scale_stages have no such timings, and are named.
Exits with 1 if there is a regression, or with --strict anything in one of the two only; with 2 if there is nothing to compare, or a
timing is no finite number above 0.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import busy, read

UNKNOWN_NOISE = 0.1


@dataclass(frozen=True)
class Change:
    """One contestant of ours in one case: `ratio`, new / old seconds after the machine's own `drift` is taken out."""

    case: str
    contestant: str
    old: float
    new: float
    drift: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.new / self.old / self.drift

    def beyond(self, least: float) -> bool:
        """Whether it is slower by more than the noise."""
        return self.ratio > 1 + max(self.noise, least)

    def gain(self, least: float) -> bool:
        return 1 / self.ratio > 1 + max(self.noise, least)


def timings(record: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of a record with median_seconds by contestant, and where it is. Of "steady" and "after_another" it is steady.

    Raises:
        ValueError: a median or a quartile is no finite number above 0.
    """
    if not isinstance(record, dict):
        return
    if "median_seconds" in record:
        medians = record["median_seconds"]
        if not isinstance(medians, dict):  # of one contestant, which has no name
            medians = {"": medians}
        medians = medians.get("steady", medians)
        spread = record.get("quartiles", {})
        medians = {name: median for name, median in medians.items() if not isinstance(median, list)}
        for name, median in medians.items():
            seconds = [median, *spread.get(name, [])]
            if len(seconds) not in (1, 3) or not all(type(s) in (int, float) and 0 < s < math.inf for s in seconds):
                raise ValueError(
                    f"{path}: {name}: expected a median and quartiles that are finite and above 0, got {seconds}"
                )
        yield path, {"median_seconds": medians, "quartiles": spread}
    for key, value in record.items():
        if key not in ("median_seconds", "after_another"):
            yield from timings(value, f"{path} / {key}" if path else key)


def timed(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A results file and its `timings`."""
    record = read(path)
    try:
        return record, dict(timings(record))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def relative_noise(case: dict[str, Any], name: str) -> float:
    found = case.get("quartiles", {}).get(name)
    return UNKNOWN_NOISE if found is None else (found[1] - found[0]) / 2 / case["median_seconds"][name]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """All contestants of ours that both records have."""
    ours = tuple(new.get("ours", ["there are none"]))
    before, after = dict(timings(old)), dict(timings(new))
    shared = {
        case: [name for name in after[case]["median_seconds"] if name in before[case]["median_seconds"]]
        for case in after
        if case in before
    }
    drifts = {
        case: {
            name: after[case]["median_seconds"][name] / before[case]["median_seconds"][name]
            for name in names
            if not name.startswith(ours)
        }
        for case, names in shared.items()
    }
    anywhere = [drift for of_case in drifts.values() for drift in of_case.values()]
    found = []
    for case, names in shared.items():
        quotients = list(drifts[case].values()) or anywhere or [1.0]
        of_peers = [relative_noise(when[case], name) for when in (before, after) for name in drifts[case]]
        for name in names:
            if name.startswith(ours):
                own = [relative_noise(when[case], name) for when in (before, after)]
                peers = statistics.median(of_peers) if of_peers else 0.0
                found.append(
                    Change(
                        case, name, before[case]["median_seconds"][name], after[case]["median_seconds"][name],
                        statistics.median(quotients), math.hypot(*own, peers),
                    )
                )  # fmt: skip
    return found


def one_sided(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """What only one of two records' `timings` has: which of the two, 0 or 1, and the case with its contestants."""
    for case in sorted(before.keys() | after.keys()):
        names = [set(cases[case]["median_seconds"]) if case in cases else set() for cases in (before, after)]
        for side in (0, 1):
            if alone := sorted(names[side] - names[1 - side]):
                yield side, f"{case}: {'; '.join(alone)}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The processor, the threads and the versions in which the two records differ."""
    sides = [
        {"cpu": record.get("machine", {}).get("cpu"), "threads": record.get("threads"), **record.get("versions", {})}
        for record in (old, new)
    ]
    for what in sides[0] | sides[1]:
        a, b = (side.get(what) for side in sides)
        if a != b:
            yield f"{what} {a} -> {b}"


def pairs(old: Path, new: Path) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """The two files, or those of the same name in both folders; and the files that only one folder has."""
    if old.is_dir() != new.is_dir():
        raise ValueError(f"{old} and {new}: expected two files, or two folders of them")
    if not old.is_dir():
        return [(old, new)], []
    names = [{path.name for path in folder.glob("*.json")} for folder in (old, new)]
    alone = [old / name for name in sorted(names[0] - names[1])] + [new / name for name in sorted(names[1] - names[0])]
    return [(old / name, new / name) for name in sorted(names[0] & names[1])], alone


def at_least_0(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def compared(old_path: Path, new_path: Path) -> tuple[list[Change], list[str], list[str]]:
    """The changes between two files; what only one of them has; what to know of the two.

    Raises:
        ValueError: one is not as `write` writes them.
    """
    paths = old_path, new_path
    try:
        (old, before), (new, after) = map(timed, paths)
        found = changes(old, new)
        only = [f"{paths[side]}: {what}" for side, what in one_sided(before, after)]
        if not found:
            return found, only, [f"{new_path.stem} has no timings of ours to compare"]
        notes = [f"{new_path.stem}: not measured alike: {what}" for what in differences(old, new)]
        for path, how in zip(paths, map(busy, (old, new)), strict=True):
            if how is not None:
                notes.append(f"{path} was measured on a busy machine ({how}): what follows of it may be noise")
        return found, only, notes
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{old_path}, {new_path}: one is damaged ({error!r}): measure again") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=at_least_0, default=0.05, help="the least change worth a word; default .05")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a file, case or contestant is in one only"
    )
    given = parser.parse_args()
    found = []
    try:
        both, alone = pairs(given.old, given.new)
        only = [str(path) for path in alone]
        for paths in both:
            of_pair, one_only, notes = compared(*paths)
            found += [(paths[1].stem, change) for change in of_pair]
            only += one_only
            for note in notes:
                print(note)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for what in only:
        print(f"only in {what}")
    if not found:
        print(f"{given.old} and {given.new} have no case of ours in common: nothing to compare", file=sys.stderr)
        raise SystemExit(2)
    slower = [(stem, change) for stem, change in found if change.beyond(given.least)]
    faster = [(stem, change) for stem, change in found if change.gain(given.least)]
    for title, chosen in (("SLOWER", slower), ("faster", faster)):
        for stem, change in chosen:
            print(
                f"{title} {stem}: {change.case}: {change.contestant}: {1e3 * change.old:.3g} -> {1e3 * change.new:.3g} ms, "
                f"{change.ratio:.2f} x with the peers' {change.drift:.2f} x taken out (noise {change.noise:.0%})"
            )
    print(f"{len(found)} timings: {len(slower)} slower, {len(faster)} faster, the rest within the noise")
    raise SystemExit(1 if slower or (given.strict and only) else 0)


if __name__ == "__main__":
    main()
