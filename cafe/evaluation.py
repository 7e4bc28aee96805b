"""The result of an evaluation: metrics with intervals, breakdowns, paired comparison, and its file.

An `Evaluation` keeps, per user and score, how many candidates were above the answer and how many like it. Everything
reported is computed from these counts (cafe.metrics). Intervals are 95% percentile bootstrap intervals over users:
they say what another sample of users would give, not what another training seed would.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cafe.data.folders import write_atomically
from cafe.metrics import METRICS, Floats, bootstrap_means, expected_metric, interval

FORMAT = "cafe-evaluation"
VERSION = 2  # 1 is the same without the checksum
SAME = (
    "dataset",
    "split",
    "protocol",
    "num_negatives",
    "popularity",
    "seed",
    "candidates",
)  # or two evaluations cannot be compared
BUCKETS = {  # lowest value of each bucket and its name; the last is open
    "train_frequency": {0: "0", 1: "1", 2: "2-4", 5: "5-19", 20: "20+"},
    "history_length": {0: "0-2", 3: "3-4", 5: "5-9", 10: "10-19", 20: "20-49", 50: "50+"},
}


Results = dict[str, dict[str, list["Evaluation"]]]  # of an experiment: protocol, system -> its seeds


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How one model ranked each user's answer.

    Attributes:
        model, preset: names for reports.
        protocol, split, seed, num_negatives, popularity: as given to `evaluate`; the last two None for `full`.
        dataset: the dataset's fingerprint.
        candidates: a hash of the users, the candidates and their intents.
        short: how many users had fewer negatives than `num_negatives`, the catalog having no more.
        users: (users,) int64, rows of the dataset.
        history_length: (users,) int64, items before the answer.
        train_frequency: (users,) int64, how often training saw the answer.
        greater, equal: for each score (`item`; `joint` where the model has intents), (users,) int64.
    """

    model: str
    preset: str | None
    protocol: str
    split: str
    seed: int
    num_negatives: int | None
    popularity: str | None
    dataset: str
    candidates: str
    short: int
    users: NDArray[np.int64]
    history_length: NDArray[np.int64]
    train_frequency: NDArray[np.int64]
    greater: dict[str, NDArray[np.int64]]
    equal: dict[str, NDArray[np.int64]]

    @property
    def headline(self) -> str:
        """The score that metrics are about unless another is asked for: `joint` where there is one, else `item`."""
        return "joint" if "joint" in self.greater else "item"

    @property
    def scores(self) -> list[str]:
        """What is reported, the headline first: `joint` where there is one, and `item`."""
        return list(dict.fromkeys([self.headline, "item"]))

    @property
    def against(self) -> str:
        """Whom the answers were ranked against, in words."""
        return "the whole catalog" if self.num_negatives is None else f"{self.num_negatives} negatives"

    @property
    def label(self) -> str:
        return f"{self.model} {self.preset}" if self.preset else self.model

    def values(self, metric: str, score: str | None = None) -> Floats:
        """Each user's expected `metric` (ndcg@k, hr@k, mrr): (users,) float64."""
        score = score or self.headline
        if score not in self.greater:
            raise ValueError(f"{self.label} has no {score} score, only: {', '.join(self.greater)}")
        return expected_metric(metric, self.greater[score], self.equal[score])

    def mean(self, metric: str, score: str | None = None) -> float:
        """The mean over users of `values`."""
        return float(self.values(metric, score).mean())

    def summary(self, resamples: int = 1000) -> dict[str, Any]:
        """Everything reported, ready for JSON: metrics and intervals of both scores, and breakdowns of the headline.

        Keys: model, preset, protocol, split, users, negatives, popularity, users_with_fewer_negatives, seed, score,
        tied (the share of users whose answer shares its score), metrics, ci, item_score {metrics, ci}, buckets
        {train_frequency, history_length: {bucket: {users, metrics, ci}}}. A bucket nobody is in has users 0 and no
        metrics.
        """
        headline, item = self._table(self.headline), self._table("item")
        return {
            "model": self.model,
            "preset": self.preset,
            "protocol": self.protocol,
            "split": self.split,
            "users": len(self.users),
            "negatives": self.num_negatives,
            "popularity": self.popularity,
            "users_with_fewer_negatives": self.short,
            "seed": self.seed,
            "score": self.headline,
            "tied": float((self.equal[self.headline] > 0).mean()),
            **_means(headline, resamples),
            "item_score": _means(item, resamples),
            "buckets": {
                name: {
                    bucket: {"users": int(members.sum())}
                    | (_means(headline[members], resamples) if any(members) else {})
                    for bucket, members in self.buckets(name).items()
                }
                for name in BUCKETS
            },
        }

    def buckets(self, name: str) -> dict[str, NDArray[np.bool_]]:
        """Who is in which bucket of `train_frequency` or `history_length`: (users,) bool each, everybody in one."""
        lowest = list(BUCKETS[name])
        number = np.searchsorted(lowest, getattr(self, name), side="right") - 1
        return {bucket: number == i for i, bucket in enumerate(BUCKETS[name].values())}

    def _table(self, score: str) -> Floats:
        return np.stack([self.values(metric, score) for metric in METRICS], axis=1)

    def save(self, path: str | Path) -> None:
        """Writes one .npz file (no pickles) with a checksum; what was at `path` is replaced only once the new file is complete."""
        meta = {"format": FORMAT, "version": VERSION} | {
            name: value for name, value in asdict(self).items() if isinstance(value, str | int | None)
        }
        arrays = {"users": self.users, "history_length": self.history_length, "train_frequency": self.train_frequency}
        for score in self.greater:
            arrays |= {f"greater/{score}": self.greater[score], f"equal/{score}": self.equal[score]}
        meta["checksum"] = _checksum(meta, arrays)
        file = io.BytesIO()
        np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
        write_atomically({Path(path): [file.getbuffer()]})

    def _fits(self) -> bool:
        """Are all values of the kind that `evaluate` makes?"""
        texts = self.model, self.protocol, self.split, self.dataset, self.candidates
        counts = self.users, self.history_length, self.train_frequency, *self.greater.values(), *self.equal.values()
        return (
            all(type(text) is str for text in texts)
            and all(type(text) in (str, type(None)) for text in (self.preset, self.popularity))
            and all(type(number) is int for number in (self.seed, self.short, self.num_negatives or 0))
            and self.greater.keys() == self.equal.keys()
            and "item" in self.greater
            and all(x.dtype == np.int64 and x.shape == (len(self.users),) and (x >= 0).all() for x in counts)
        )

    @staticmethod
    def file_name(split: str, protocol: str) -> str:
        """Of the evaluation of everybody in a run folder."""
        return f"{split}-{protocol}.npz"

    def keep(self, run: Path) -> None:
        """`save` to the run folder `run`; warns where that cannot be written, as the result is there all the same."""
        try:
            self.save(run / self.file_name(self.split, self.protocol))
        except OSError as error:
            warnings.warn(f"the evaluation is not saved in {run}: {error}", stacklevel=3)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Reads what `save` wrote.

        Raises:
            OSError: it cannot be read; FileNotFoundError: no such file.
            ValueError: not such a file, a damaged one, or one of another version.
        """
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"cannot read {path} as a saved evaluation: it is not a file")
        content = Path(path).read_bytes()
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays: dict[str, Any] = dict(file)
            meta: dict[str, Any] = json.loads(str(arrays.pop("meta")))
            kind = meta["format"], meta["version"]
            if kind not in ((FORMAT, 1), (FORMAT, VERSION)):
                raise ValueError(f"its format is {kind[0]} {kind[1]}, this release reads {FORMAT} {VERSION}")
            if kind[1] == VERSION and meta.pop("checksum") != _checksum(meta, arrays):
                raise ValueError("it is damaged or was altered (its checksum differs)")
            del meta["format"], meta["version"]
            for part in ("greater", "equal"):
                meta[part] = {name[len(part) + 1 :]: arrays[name] for name in arrays if name.startswith(f"{part}/")}
            found = cls(**meta, **{name: array for name, array in arrays.items() if "/" not in name})
            if not found._fits():
                raise ValueError("its parts contradict each other")
            return found
        except Exception as error:  # numpy and zipfile raise of many kinds for one flipped bit
            raise ValueError(f"cannot read {path} as a saved evaluation: {error}") from None


def _checksum(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """BLAKE2b (128 bits) of all that a file holds, names included, which the sums that zip keeps leave out."""
    digest = blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def compare(
    a: Evaluation | Sequence[Evaluation],
    b: Evaluation | Sequence[Evaluation],
    metric: str = "ndcg@5",
    score_a: str | None = None,
    score_b: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Is `a` better than `b` on the same users and candidates? The paired bootstrap over users.

    Args:
        a, b: an evaluation each, or several (training seeds): then each user's values are averaged over them first.
        score_a, score_b: `item` or `joint`; by default each one's headline.

    Returns:
        a, b (names), metric, protocol, split, users, mean_a, mean_b; diff = mean_a - mean_b and diff_ci;
        ratio = mean_a / mean_b and ratio_ci (None where b is 0 in a resample: the ratio has no interval); p, the
        two-sided bootstrap p-value of diff = 0, not below 2 / (resamples + 1); better, worse: the share of users with
        a higher and a lower value under a.

    Raises:
        ValueError: the two differ in dataset, split, protocol, number of negatives, seed, users or candidates.
    """
    many_a, many_b = ([x] if isinstance(x, Evaluation) else list(x) for x in (a, b))
    if not many_a or not many_b:
        raise ValueError("nothing to compare: give at least one evaluation on each side")
    first = many_a[0]
    for other in (*many_a[1:], *many_b):
        for field in SAME:
            mine, theirs = getattr(first, field), getattr(other, field)
            if mine != theirs:
                raise ValueError(f"{first.label} and {other.label} cannot be compared: {field} is {mine} and {theirs}")
    columns = [
        np.mean([evaluation.values(metric, score) for evaluation in many], axis=0)
        for many, score in ((many_a, score_a), (many_b, score_b))
    ]
    values = np.stack(columns, axis=1)
    mean_a, mean_b = values.mean(axis=0).tolist()
    resampled = bootstrap_means(values, resamples, seed)
    diffs = resampled[:, 0] - resampled[:, 1]
    has_ratio = bool(resampled[:, 1].min() > 0)
    tail = 1 + min(int((diffs <= 0).sum()), int((diffs >= 0).sum()))
    return {
        "a": first.label,
        "b": many_b[0].label,
        "metric": metric,
        "protocol": first.protocol,
        "split": first.split,
        "users": len(first.users),
        "mean_a": mean_a,
        "mean_b": mean_b,
        "diff": mean_a - mean_b,
        "diff_ci": interval(diffs).tolist(),
        "ratio": mean_a / mean_b if mean_b > 0 else None,
        "ratio_ci": interval(resampled[:, 0] / resampled[:, 1]).tolist() if has_ratio else None,
        "p": min(1.0, 2 * tail / (resamples + 1)),
        "better": float((values[:, 0] > values[:, 1]).mean()),
        "worse": float((values[:, 0] < values[:, 1]).mean()),
    }


def _means(table: Floats, resamples: int) -> dict[str, Any]:
    low, high = interval(bootstrap_means(table, resamples))
    return {
        "metrics": dict(zip(METRICS, table.mean(axis=0).tolist(), strict=True)),
        "ci": {name: [float(low[i]), float(high[i])] for i, name in enumerate(METRICS)},
    }
