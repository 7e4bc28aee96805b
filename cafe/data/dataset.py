"""A prepared dataset: every user's items in time order (CSR), each item's intent, and the vocabularies.

`cafe prepare` writes one; training, evaluation and recommendation read it. The split is leave-last-2-out: a user's last
item is the test answer, the last but one the validation answer, everything before is for training.

On the disk it is a folder:

    meta.json           format, version, counts, checksums (its own too), fingerprint, how it was prepared and what was dropped
    indptr.npy          int64 (users + 1)   row u of items is items[indptr[u]:indptr[u + 1]]
    items.npy           int32 (interactions)
    item_intent.npy     int32 (items)
    users.parquet, items.parquet, intents.parquet    one column `id`; the position is the number used in the arrays
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cafe.data.folders import checksum, new_folder, read_sealed, seal, write_file, write_with_checksum

FORMAT = "cafe-dataset"
VERSION = 2
MARKER = "meta.json"
ARRAYS = {"indptr": np.int64, "items": np.int32, "item_intent": np.int32}
VOCABULARIES = ("users", "items", "intents")
AT_ONCE = 1 << 20  # interactions that are sorted or gathered at a time, which takes some 50 bytes each
FILES = [f"{name}.npy" for name in ARRAYS] + [f"{name}.parquet" for name in VOCABULARIES]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows of different lengths, packed (CSR): row r is `items[indptr[r]:indptr[r + 1]]`, oldest first.

    Attributes:
        indptr: int64 (rows + 1), from 0, never falling.
        items: int32 (indptr[-1]).

    Example:
        >>> sequences = Sequences(np.array([0, 3, 3, 5]), np.array([7, 8, 9, 1, 2], np.int32))
        >>> len(sequences), sequences[0].tolist(), sequences.take([2, 0], last=2).items.tolist()
        (3, [7, 8, 9], [1, 2, 8, 9])
    """

    indptr: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Row `row` as a view, int32 (its length)."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.items[self.indptr[row] : self.indptr[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows)."""
        return np.diff(self.indptr)

    def take(self, rows: Any, last: int | None = None) -> "Sequences":
        """The rows numbered `rows` (any integers, repeats allowed), each cut to its `last` newest items if given."""
        rows = np.asarray(rows, dtype=np.int64)
        start, stop = self.indptr[rows], self.indptr[rows + 1]
        return self._gather(start if last is None else np.maximum(start, stop - last), stop)

    def _gather(self, start: np.ndarray, stop: np.ndarray) -> "Sequences":
        """New rows made of `items[start[i]:stop[i]]`."""
        lengths = stop - start
        indptr = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=indptr[1:])
        items = np.empty(indptr[-1], self.items.dtype)
        for first, last in _blocks(indptr):
            positions = np.repeat((start - indptr[:-1])[first:last], lengths[first:last])
            positions += np.arange(indptr[first], indptr[last])
            items[indptr[first] : indptr[last]] = self.items[positions]
        return Sequences(indptr, items)


@dataclass(frozen=True, eq=False)
class Holdout:
    """One evaluation split: what the model may see of each user, and the item that came next.

    Attributes:
        users: int64 (rows), the user's row in the dataset.
        histories: what the model may see, one row per user.
        answers: int32 (rows), the held-out item.
    """

    users: np.ndarray
    histories: Sequences
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, eq=False)
class Dataset:
    """All interactions, each item's intent, and the ids behind the numbers.

    Attributes:
        sequences: one row per user, oldest first.
        item_intent: int32 (num_items), the intent of each item.
        user_ids, item_ids, intent_ids: the original ids (a polars Series of their own type); position = number.
        preparation: how it was prepared and what was dropped; kept in meta.json.

    Example:
        >>> dataset = Dataset(Sequences(np.array([0, 3]), np.array([0, 1, 2], np.int32)), np.array([0, 0, 1], np.int32),
        ...                   pl.Series(["ann"]), pl.Series(["a", "b", "c"]), pl.Series(["tea", "pots"]))
        >>> dataset.holdout("test").answers.tolist(), dataset.train()[0].tolist()
        ([2], [0])
    """

    sequences: Sequences
    item_intent: np.ndarray
    user_ids: pl.Series
    item_ids: pl.Series
    intent_ids: pl.Series
    preparation: dict[str, Any] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_intents(self) -> int:
        return len(self.intent_ids)

    def __repr__(self) -> str:
        counts = ("interactions", len(self.sequences.items)), ("users", self.num_users), ("items", self.num_items)
        return f"Dataset({', '.join(f'{count:,} {name}' for name, count in counts)}, {self.num_intents:,} intents)"

    def stats(self) -> dict[str, int | float]:
        """The statistics of the paper's Table 1, and interactions per item."""
        interactions = len(self.sequences.items)
        return {
            "interactions": interactions,
            "items": self.num_items,
            "intents": self.num_intents,
            "sequences": self.num_users,
            "mean_length": interactions / self.num_users,
            "density": interactions / (self.num_users * self.num_items),
            "interactions_per_item": interactions / self.num_items,
            "users_too_short_to_evaluate": int((self.sequences.lengths < 3).sum()),
        }

    def train(self) -> Sequences:
        """Every user's items less the last two; a user with fewer than 3 is kept whole, and never evaluated."""
        start, stop = self.sequences.indptr[:-1], self.sequences.indptr[1:]
        return self.sequences._gather(start, np.where(stop - start < 3, stop, stop - 2))

    def holdout(self, split: str) -> Holdout:
        """The users with 3 items or more; the answer is the last but one ("valid") or the last ("test") item.

        The history is everything before the answer, so that of "test" holds the validation item.
        """
        if split not in ("valid", "test"):
            raise ValueError(f"split {split!r}: expected 'valid' or 'test'")
        users = np.flatnonzero(self.sequences.lengths >= 3)
        answer = self.sequences.indptr[users + 1] - (2 if split == "valid" else 1)
        histories = self.sequences._gather(self.sequences.indptr[users], answer)
        return Holdout(users, histories, self.sequences.items[answer])

    def train_counts(self) -> np.ndarray:
        """int64 (num_items): how often each item occurs in `train()`."""
        return np.bincount(self.train().items, minlength=self.num_items)

    def sorted_histories(self) -> Sequences:
        """Each user's WHOLE set of items, ascending and without repeats: what a negative must not be."""
        indptr, items = self.sequences.indptr, self.sequences.items
        lengths, sets = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
        for start, stop in _blocks(indptr):
            row = np.repeat(np.arange(stop - start), np.diff(indptr[start : stop + 1]))
            pairs = np.sort(row * self.num_items + items[indptr[start] : indptr[stop]])
            row, of_row = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], self.num_items)
            lengths.append(np.bincount(row, minlength=stop - start))
            sets.append(of_row.astype(np.int32))
        return Sequences(np.cumsum(np.concatenate(lengths)), np.concatenate(sets))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content (arrays, ids and their types): a run stores it, to refuse another dataset."""
        digest = blake2b(digest_size=16)
        for name in ARRAYS:
            digest.update(np.ascontiguousarray(self._array(name)).data)
        for name in VOCABULARIES:
            ids = self._vocabulary(name)
            text = ids.cast(pl.String)
            digest.update(str(ids.dtype).encode())
            digest.update(text.str.len_bytes().to_numpy().data)
            digest.update(text.str.join("").item().encode())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the folder `path`; an earlier prepared dataset there is replaced only once this one is complete.

        Raises:
            FileExistsError: `path` is a file or a folder of something else.
            OSError: the disk is full or may not be written; what was at `path` is still there.
        """
        with new_folder(path, MARKER, FORMAT, [MARKER, *FILES]) as folder:
            checksums = {}
            for name in ARRAYS:
                checksums[f"{name}.npy"] = write_with_checksum(folder / f"{name}.npy", _npy(self._array(name)))
            for name in VOCABULARIES:
                buffer = io.BytesIO()
                self._vocabulary(name).rename("id").to_frame().write_parquet(buffer)
                checksums[f"{name}.parquet"] = write_with_checksum(folder / f"{name}.parquet", [buffer.getbuffer()])
            meta = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": self.fingerprint,
                "stats": self.stats(),
                "preparation": self.preparation,
                "checksums": checksums,
            }
            write_file(folder / MARKER, [seal(meta)])

    @classmethod
    def load(cls, path: str | Path) -> "Dataset":
        """Opens a prepared folder; the arrays are memory-mapped.

        Raises:
            FileNotFoundError: there is no such folder, or one of its files is missing.
            ValueError: not a prepared dataset, another version, or a file that is not as it was written (named).
        """
        folder = Path(path)
        meta = _read_meta(folder)
        checksums, preparation = meta.get("checksums"), meta.get("preparation", {})
        if not isinstance(checksums, dict) or not isinstance(preparation, dict):
            raise ValueError(f"{folder / MARKER} is damaged (it lacks checksums): prepare the data again")
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: prepare the data again")
            if checksum(folder / name) != checksums.get(name):
                raise ValueError(f"{folder / name} is damaged (its checksum differs): prepare the data again")
        arrays = {name: _read_array(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        ids = {name: _read_ids(folder / f"{name}.parquet") for name in VOCABULARIES}
        sequences = Sequences(arrays["indptr"], arrays["items"])
        dataset = cls(sequences, arrays["item_intent"], ids["users"], ids["items"], ids["intents"], preparation)
        if not dataset._fits():
            raise ValueError(f"{folder} is damaged (its files contradict each other): prepare the data again")
        return dataset

    def _fits(self) -> bool:
        """Every number is one of a user, an item or an intent that is there."""
        indptr, items = self.sequences.indptr, self.sequences.items
        return (
            len(indptr) == self.num_users + 1
            and indptr[0] == 0
            and indptr[-1] == len(items)
            and bool((indptr[1:] >= indptr[:-1]).all())
            and len(self.item_intent) == self.num_items
            and _below(items, self.num_items)
            and _below(self.item_intent, self.num_intents)
        )

    def _array(self, name: str) -> np.ndarray:
        return self.item_intent if name == "item_intent" else getattr(self.sequences, name)

    def _vocabulary(self, name: str) -> pl.Series:
        return {"users": self.user_ids, "items": self.item_ids, "intents": self.intent_ids}[name]


def _read_array(path: Path, dtype: Any) -> np.ndarray:
    """A vector, memory-mapped; nothing is unpickled."""
    try:
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        if array.dtype != dtype or array.ndim != 1:
            raise ValueError(f"expected {np.dtype(dtype)} (n,), found {array.dtype} {array.shape}")
    except Exception as error:  # numpy raises of many kinds
        raise ValueError(f"{path} is damaged ({error}): prepare the data again") from None
    return array


def _read_ids(path: Path) -> pl.Series:
    try:
        return pl.read_parquet(path, glob=False)["id"]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the data again") from None


def _below(numbers: np.ndarray, limit: int) -> bool:
    return len(numbers) == 0 or (int(numbers.min()) >= 0 and int(numbers.max()) < limit)


def _blocks(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of rows, first to last - 1, of about AT_ONCE entries together."""
    rows = len(indptr) - 1
    if indptr[-1] <= AT_ONCE:
        return iter([(0, rows)])
    first = np.searchsorted(indptr, np.arange(0, indptr[-1], AT_ONCE))
    return pairwise(np.unique([0, *first, rows]).tolist())


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a prepared folder, or an error that says what the folder is instead."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected a dataset made by `cafe prepare`")
    if not (folder / MARKER).is_file():
        raise ValueError(f"{folder} is not a prepared dataset (no {MARKER}): make one with `cafe prepare`")
    return read_sealed(folder / MARKER, FORMAT, VERSION, "prepare the data again with `cafe prepare`")


def _npy(array: np.ndarray) -> list[Any]:
    """The bytes of a .npy file: header, then the array itself."""
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), array.data]
