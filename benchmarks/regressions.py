"""What became slower between two result files, or two folders of them, by more than the noise.

    python -m benchmarks.regressions OLD NEW [--least 0.05]

Of each case in both, each contestant of this library: its median seconds, new / old, divided by the median of the same quotient of the
peers in that case (of the whole file, where the case has none), since a machine that is slower today is slower for them too. The
noise is half the distance of the quartiles, relative to the median, of the old and the new measurement and of those peers, as the root
of the sum of squares; 10% each where a file has no quartiles. A change beyond both the noise and --least is a regression, or as
much a gain. Exits with 1 if there is a regression, with 2 if there is nothing to compare.
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
    """Every part of a record with median_seconds by contestant, and where it is. Of "steady" and "after_another" it is steady."""
    if not isinstance(record, dict):
        return
    medians = record.get("median_seconds")
    if isinstance(medians, dict) and "steady" in medians:
        yield path, {"median_seconds": medians["steady"], "quartiles": record.get("quartiles", {})}
    elif isinstance(medians, float):  # of one contestant, which has no name
        yield path, {"median_seconds": {"": medians}}
    elif isinstance(medians, dict) and all(isinstance(value, float) for value in medians.values()):
        yield path, record
    for key, value in record.items():
        if key != "median_seconds":
            yield from timings(value, f"{path} / {key}" if path else key)


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


def pairs(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """The two files, or those of the same name in both folders."""
    if old.is_dir() != new.is_dir():
        raise ValueError(f"{old} and {new}: expected two files, or two folders of them")
    if not old.is_dir():
        return [(old, new)]
    return [(old / path.name, path) for path in sorted(new.glob("*.json")) if (old / path.name).exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=0.05, help="the least change worth a word; default .05")
    given = parser.parse_args()
    found = []
    try:
        for old, new in pairs(given.old, given.new):
            records = read(old), read(new)
            found += [(new.stem, change) for change in changes(*records)]
            for path, how in zip((old, new), map(busy, records), strict=True):
                if how is not None:
                    print(f"{path} was measured on a busy machine ({how}): what follows of it may be noise")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
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
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
