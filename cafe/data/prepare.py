"""From files of interactions and items to a `Dataset`: number the ids, sort each user by time, filter, count.

The steps, in this order; the report (`Dataset.preparation`) says how much each took away:

1. Rows without a user, item or timestamp are refused, or dropped on request; so are rows without the values of `keep`.
2. A user's rows are sorted by timestamp; equal timestamps keep the order of the files.
3. `duplicates`: what to do with a user's repeated interactions with one item.
4. `min_item_count` and `min_sequence_length`, repeated until both hold for everything that is left (the k-core).
5. Each item gets its intent; an item without one gets the intent "unknown". Of several it keeps the first that the items
   file names; in a log whose rows name the intent, the one of most rows, of equally many the smallest.
6. Users, items and intents are numbered in the order of their ids, whatever the order of the rows.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import polars as pl

from cafe.data import dataset as data
from cafe.data.dataset import Dataset, Sequences
from cafe.data.files import Format, Options, Table, read_table
from cafe.data.folders import check_replaceable
from cafe.data.raw import FORMATS

UNKNOWN = "unknown"
WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,17})$"
DATE_FORMATS = ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%+")
Duplicates = Literal["keep", "exact", "first", "last"]


def prepare(
    interactions: str | Path,
    items: str | Path | None = None,
    out: str | Path | None = None,
    *,
    format: str = "table",
    user_col: str | None = None,
    item_col: str | None = None,
    time_col: str | None = None,
    intent_col: str | None = None,
    items_item_col: str | None = None,
    separator: str = ",",
    intent_level: int = -1,
    seq_separator: str = " ",
    keep: Mapping[str, Collection[str]] = MappingProxyType({}),
    min_sequence_length: int = 1,
    min_item_count: int = 1,
    duplicates: Duplicates = "keep",
    drop_incomplete: bool = False,
    keep_unseen_items: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Dataset:
    """Makes a dataset of a file of interactions and a file of items, and saves it to the folder `out` if given.

    Files are CSV or Parquet, plain or gzip, or a folder of such parts, or of another `format` (`cafe.data.raw`). Ids are
    text or whole numbers and keep their type (a CSV column is numbers if every value is a whole number written plainly:
    7, not 007 or 7.0). Timestamps are numbers, dates, or ISO 8601 text.

    Args:
        interactions: one row per interaction, columns `user_col`, `item_col` and `time_col`.
        items: one row per item, columns `items_item_col` (default: `item_col`) and `intent_col`. An item listed more
            than once keeps its first intent, so this may be the interactions' own file if its rows name the intent.
            Default for "tmall" and "ijcai16": the interactions' own file.
        format: "table", "amazon", "tmall", "ijcai16" or "recbole"; it says how the columns are called unless they are named here.
        intent_level: how much of a category path is the intent: 1 its root, 2 the next as well, -1 all, -2 all but the last.
        seq_separator: between the parts of a sequence in RecBole's files.
        keep: column of the interactions -> values as the file writes them; other rows are left out and counted.
        out: the folder to write; an earlier prepared dataset there is replaced once the new one is complete.
        min_sequence_length: the fewest interactions of a user.
        min_item_count: the fewest interactions of an item.
        duplicates: "keep" all; "exact" drops rows equal in user, item and timestamp to an earlier one; "first" and
            "last" keep a user's first or last interaction with each item.
        drop_incomplete: drop and count rows without a user, item or timestamp, instead of refusing them.
        keep_unseen_items: keep items of the items file that no interaction names (dropped and counted by default).
        progress: called with the name of each step as it starts.

    Returns:
        The dataset, loaded from `out` if given. `preparation` holds the options, counts and warnings.

    Raises:
        FileNotFoundError, FileExistsError: no such file; `out` is something else than a prepared dataset.
        ValueError: a file or value that cannot be used; says which column, row and file.

    Example:
        >>> import tempfile; folder = Path(tempfile.mkdtemp())
        >>> rows = "user,item,timestamp\\nann,pot,2\\nann,tea,1\\nann,tea,5\\nbob,tea,5\\n"
        >>> _ = (folder / "buys.csv").write_text(rows)
        >>> _ = (folder / "items.csv").write_text("item,intent\\ntea,drinks\\npot,kitchen\\n")
        >>> dataset = prepare(folder / "buys.csv", folder / "items.csv")
        >>> dataset.item_ids[dataset.sequences[0]].to_list()
        ['tea', 'pot', 'tea']
    """
    if duplicates not in get_args(Duplicates):
        raise ValueError(f"duplicates {duplicates!r}: expected one of {', '.join(get_args(Duplicates))}")
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if intent_level == 0 or not seq_separator:
        raise ValueError("intent_level counts from 1 (the root) or from -1 (the finest); seq_separator is not empty")
    if min(min_sequence_length, min_item_count) < 1:
        raise ValueError("min_sequence_length and min_item_count count from 1")
    if out is not None:
        check_replaceable(Path(out), data.MARKER, data.FORMAT, [data.MARKER, *data.FILES])
    notes: list[str] = []
    kind, options = FORMATS[format], Options(separator, intent_level, seq_separator)
    item_col = item_col or kind.item
    own_items = items is None and kind.names_intents

    progress("reading interactions")
    columns = {"user": user_col or kind.user, "item": item_col, "time": time_col or kind.time}
    events, users, items_seen, dropped = _events(
        read_table(interactions, columns, kind, options, keep), columns, kind, drop_incomplete
    )
    read = {"interactions": len(events), "users": len(users), "items": len(items_seen)}

    progress("sorting and filtering")
    events = _distinct(events.sort("user", "time", maintain_order=True), duplicates).drop("time")
    dropped["duplicate_rows"] = read["interactions"] - len(events)
    kept = _core(events, min_sequence_length, min_item_count)
    dropped["filtered_rows"] = len(events) - len(kept)
    kept_users, kept_items = kept["user"].unique().sort(), kept["item"].unique().sort()
    dropped["filtered_users"] = len(users) - len(kept_users)
    dropped["filtered_items"] = len(items_seen) - len(kept_items)
    if len(kept_users) < 2 or len(kept_items) < 2:
        raise ValueError(
            f"{interactions}: {_count(len(kept_users), 'user')} and {_count(len(kept_items), 'item')} are left of "
            f"{_count(len(users), 'user')} and {_count(len(items_seen), 'item')}; two of each are the least"
        )

    progress("giving items their intents")
    catalog = pl.DataFrame({"id": items_seen.gather(kept_items), "number": kept_items})
    if items is None and not own_items:
        notes.append(f"no items file: every item gets the intent {UNKNOWN!r}")
        intents, typed = pl.repeat(UNKNOWN, len(catalog), eager=True), True
    else:
        columns = {"item": items_item_col or item_col, "intent": intent_col or kind.intent}
        source, wanted = (interactions, keep) if items is None else (items, {})
        labels, typed, dropped["incomplete_item_rows"] = _labels(
            read_table(source, columns, kind, options, wanted), columns, kind, drop_incomplete
        )
        unseen = _unseen(labels, items_seen)
        dropped["unseen_items"] = 0 if keep_unseen_items else len(unseen)
        if keep_unseen_items:
            catalog = _append(catalog, unseen)
        intents = _intents(catalog, labels, notes, "most frequent" if own_items else "first")
    intent_ids, item_intent = _number(intents, typed)

    lengths = np.bincount(kept["user"], minlength=len(users))[kept_users]
    if lengths.max() < 3:
        notes.append("no user has 3 interactions or more: nothing can be evaluated")
    number = np.zeros(len(items_seen), np.int32)
    seen = catalog["number"].is_not_null()
    number[catalog["number"].filter(seen)] = np.flatnonzero(seen)
    dataset = Dataset(
        Sequences(np.concatenate([[0], np.cumsum(lengths)]), number[kept["item"]]),
        item_intent,
        users.gather(kept_users),
        catalog["id"],
        intent_ids,
        {
            "interactions": str(interactions),
            "items": None if items is None else str(items),
            "options": {
                "format": format,
                "intent_level": intent_level,
                "keep": {column: list(values) for column, values in keep.items()},
                "duplicates": duplicates,
                "min_item_count": min_item_count,
                "min_sequence_length": min_sequence_length,
                "drop_incomplete": drop_incomplete,
                "keep_unseen_items": keep_unseen_items,
            },
            "read": read,
            "dropped": dropped,
            "warnings": notes,
        },
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if out is None:
        return dataset
    progress("writing")
    dataset.save(out)
    return Dataset.load(out)


def _events(
    table: Table, columns: dict[str, str], format: Format, drop_incomplete: bool
) -> tuple[pl.DataFrame, pl.Series, pl.Series, dict[str, int]]:
    """Rows in file order (user, item: int32 numbers; time: int64 or float64), user ids, item ids, rows dropped."""
    times = _times(table, columns["time"])
    complete = _complete(table, columns, format, drop_incomplete)
    dropped = {"incomplete_rows": int((table.kept & ~complete).sum()), "unkept_rows": int((~table.kept).sum())}
    complete &= table.kept
    times = times.filter(complete)
    users, user = _number(_ids(table, "user", columns).filter(complete), table.typed)
    items, item = _number(_ids(table, "item", columns).filter(complete), table.typed)
    return (
        pl.DataFrame({"user": user, "item": item, "time": times}),
        users,
        items,
        dropped,
    )


def _labels(
    table: Table, columns: dict[str, str], format: Format, drop_incomplete: bool
) -> tuple[pl.DataFrame, bool, int]:
    """Rows (item: text, intent: text or number, null where missing), whether the files knew types, rows dropped.

    Of a log whose rows name the intent: each pair once, an item's most frequent intent first, then the smallest.
    """
    complete = _complete(table, {"item": columns["item"]}, format, drop_incomplete)
    labels = pl.DataFrame({"item": _ids(table, "item", columns), "intent": _ids(table, "intent", columns)})
    labels = labels.filter(complete & table.kept)
    if format.names_intents:
        labels = labels.group_by("item", "intent").len().sort("len", "intent", descending=[True, False]).drop("len")
    return labels.cast({"item": pl.String}), table.typed, int((table.kept & ~complete).sum())


def _complete(table: Table, columns: dict[str, str], format: Format, drop_incomplete: bool) -> pl.Series:
    """Which rows have a value in each of `columns`; refuses others that are kept unless they are to be dropped."""
    complete = table.frame.select(pl.all_horizontal(pl.col(*columns).is_not_null())).to_series()
    missing = np.flatnonzero(table.kept & ~complete)
    if len(missing) and not drop_incomplete:
        name = next(name for name in columns if table.frame[name][int(missing[0])] is None)
        raise ValueError(
            f"column {columns[name]!r}, {table.where(int(missing[0]))}: no value{format.wrong} "
            f"({_count(len(missing), 'such row')}; --drop-incomplete drops them)"
        )
    return complete


def _ids(table: Table, name: str, columns: dict[str, str]) -> pl.Series:
    """A column of ids as text or whole numbers."""
    ids = table.frame[name]
    if ids.dtype.is_integer():
        return ids if ids.dtype == pl.UInt64 else ids.cast(pl.Int64)
    if ids.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        return ids.cast(pl.String)
    raise ValueError(
        f"{table.files[0]}: column {columns[name]!r} is of type {ids.dtype}: ids are text or whole numbers"
    )


def _times(table: Table, column: str) -> pl.Series:
    """The timestamps as int64 or float64; text is read as numbers or ISO 8601 dates, whichever the first one is."""
    times = table.frame["time"]
    if times.dtype.is_temporal():
        return times.to_physical().cast(pl.Int64)
    numbers, exact = times, pl.repeat(True, len(times), eager=True)
    if times.dtype == pl.String:
        numbers, exact = _parse(times)
    elif times.dtype.is_float():
        numbers = times.set(times.is_finite().not_(), None)
    elif not times.dtype.is_integer():
        raise ValueError(f"{table.files[0]}: column {column!r} is of type {times.dtype}: expected numbers or dates")
    wrong = np.flatnonzero(numbers.is_null() & times.is_not_null())
    if len(wrong):
        first, value = times.drop_nulls()[0], times[int(wrong[0])]
        kind = "" if value == first else f", or not of the kind of the first one, {first!r}"
        raise ValueError(
            f"column {column!r}, {table.where(int(wrong[0]))}: {value!r} is not a timestamp{kind} "
            "(expected numbers or ISO 8601 dates)"
        )
    inexact = np.flatnonzero(~exact)
    if len(inexact):
        row = int(inexact[0])
        raise ValueError(
            f"column {column!r}, {table.where(row)}: {times[row]!r} would be rounded and the order lost (kept are whole "
            "numbers of 64 bits, with others among them about 16 digits, and dates to the nanosecond from 1678 to 2261)"
        )
    return numbers


def _parse(times: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Text to int64, float64 or micro- or nanoseconds since 1970 (int64), and whether each keeps its place in the order.

    The number is null where the text is not of the kind of the first one.
    """
    first = times.drop_nulls().head(1)
    everything = pl.repeat(True, len(times), eager=True)
    for format in DATE_FORMATS:
        if first.str.to_datetime(format, strict=False).count():
            micros = times.str.to_datetime(format, strict=False).to_physical()
            if not times.str.contains(r"\.\d{6}0*[1-9]").any():
                return micros, everything
            nanos = times.str.to_datetime(format, strict=False, time_unit="ns").to_physical()
            overflowed = nanos // 1000 != micros  # years that 64 bits of nanoseconds cannot reach wrap around
            return nanos, ~(overflowed | times.str.contains(r"\.\d{9}0*[1-9]")).fill_null(False)
    numbers = times.cast(pl.Int64, strict=False)
    if numbers.null_count() == times.null_count():
        return numbers, everything
    numbers = times.cast(pl.Float64, strict=False)
    numbers = numbers.set(numbers.is_finite().not_(), None)
    return numbers, ~times.is_in(_merged(times, numbers).implode()).fill_null(False)


def _merged(texts: pl.Series, numbers: pl.Series) -> pl.Series:
    """The texts whose float64 is also that of an earlier text of another value."""
    different = pl.DataFrame({"text": texts, "number": numbers}).drop_nulls().unique("text", maintain_order=True)
    values: dict[float, Decimal] = {}
    shared = different.filter(pl.col("number").is_duplicated()).iter_rows()
    merged = [text for text, number in shared if values.setdefault(number, Decimal(text)) != Decimal(text)]
    return pl.Series(merged, dtype=pl.String)


def _number(ids: pl.Series, typed: bool) -> tuple[pl.Series, np.ndarray]:
    """The different ids in ascending order, and for each row the position of its id, int32 (rows)."""
    different = ids.unique().to_frame("id")
    known = pl.col("id")
    if not typed and different["id"].str.contains(WHOLE_NUMBER).all():
        known = known.cast(pl.Int64)
    different = different.with_columns(known.alias("known")).sort("known").with_row_index("number")
    numbers = ids.to_frame("id").join(different, on="id", how="left", maintain_order="left")["number"]
    return different["known"], numbers.cast(pl.Int32).to_numpy()


def _distinct(events: pl.DataFrame, duplicates: Duplicates) -> pl.DataFrame:
    """Rows sorted by user and time, less those that the policy takes for repeats."""
    if duplicates == "keep":
        return events
    same = ["user", "item", "time"] if duplicates == "exact" else ["user", "item"]
    return events.unique(same, keep="last" if duplicates == "last" else "first", maintain_order=True)


def _core(events: pl.DataFrame, min_sequence_length: int, min_item_count: int) -> pl.DataFrame:
    """The largest part of the rows in which every user and every item has its least number of rows."""
    enough = (pl.len().over("item") >= min_item_count) & (pl.len().over("user") >= min_sequence_length)
    while min_item_count > 1 or min_sequence_length > 1:
        rows = len(events)
        events = events.filter(enough)
        if len(events) == rows:
            break
    return events


def _unseen(labels: pl.DataFrame, seen: pl.Series) -> pl.Series:
    """The items of the items file, as text, that no interaction names."""
    named = seen.cast(pl.String).to_frame("item")
    return labels.select("item").unique().join(named, on="item", how="anti")["item"]


def _append(catalog: pl.DataFrame, unseen: pl.Series) -> pl.DataFrame:
    """The catalog with the unseen items, sorted by id; all ids become text if an unseen one is not a number."""
    if catalog["id"].dtype.is_integer() and unseen.str.contains(WHOLE_NUMBER).all():
        unseen = unseen.cast(catalog["id"].dtype)
    extra = pl.DataFrame({"id": unseen}).with_columns(number=pl.lit(None, pl.Int32))
    return pl.concat([catalog.cast({"id": unseen.dtype}), extra]).sort("id")


def _intents(catalog: pl.DataFrame, labels: pl.DataFrame, notes: list[str], which: str) -> pl.Series:
    """The intent of each item of the catalog: the first that the items file gives it, or else "unknown"."""
    labels = labels.drop_nulls().unique(maintain_order=True)
    key = catalog.select(item=pl.col("id").cast(pl.String))
    several = labels.filter(pl.col("item").is_duplicated()).join(key, on="item", how="semi")["item"].n_unique()
    if several:
        notes.append(f"{_count(several, 'item')} listed with several intents: the {which} one is kept")
    labels = labels.unique("item", keep="first", maintain_order=True)
    intents = key.join(labels, on="item", how="left", maintain_order="left")["intent"]
    if missing := intents.null_count():
        notes.append(f"{_count(missing, 'item')} without an intent: given the intent {UNKNOWN!r}")
        intents = intents.cast(pl.String).fill_null(UNKNOWN)
    return intents


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
