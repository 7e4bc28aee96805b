"""Reads columns of a file, or of a folder of such parts, in the order of the rows; by default of CSV or Parquet, plain or gzip.

CSV columns stay text, so that an id such as 007 is not turned into 7; `cafe.data.prepare` decides on types. Empty text,
quoted or not, and NaN are missing values (null). `cafe.data.raw` has the formats of published data sets.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

import numpy as np
import polars as pl
import polars.selectors as cs

CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = (".parquet", ".parquet.gz")
KEPT = " kept"  # of a row, in the frames of this file; no column of a user's is called so


@dataclass(frozen=True)
class Options:
    """What some formats are told: the separator of CSV; of raw files (`cafe.data.raw`), what is the intent."""

    separator: str = ","
    intent_level: int = -1
    seq_separator: str = " "


@dataclass(frozen=True)
class Format:
    """How the files of one kind are read.

    Attributes:
        suffixes: how the names of its files end.
        scan: from a file and the names of the wanted columns to its rows, with these columns and maybe others.
        user, item, time, intent: the columns, unless others are named.
        integers: all values are whole numbers, which need less memory than text.
        names_intents: each interaction names the intent of its item, so that it needs no other file.
        wrong: what else than emptiness makes a value missing, for an error message.
    """

    suffixes: tuple[str, ...]
    scan: Callable[[Path, Collection[str], Options], pl.LazyFrame]
    user: str
    item: str
    time: str
    intent: str
    integers: bool = False
    names_intents: bool = False
    wrong: str = ""


@dataclass(frozen=True)
class Table:
    """Rows read from one or several files.

    Attributes:
        frame: the wanted columns under their new names, all files one after the other.
        files: the files, in reading order.
        starts: int64 (files), the row of `frame` at which each file starts.
        typed: False where all columns are text because the file knows no types, as CSV.
        kept: Boolean (rows), which rows have the values asked for.
    """

    frame: pl.DataFrame
    files: list[Path]
    starts: np.ndarray
    typed: bool
    kept: pl.Series

    def where(self, row: int) -> str:
        """Where row `row` of `frame` came from, for an error message; a file's rows count from 1 after its header."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row - self.starts[part] + 1:,} of {self.files[part]}"


def read_table(
    path: str | Path,
    columns: Mapping[str, str],
    format: Format,
    options: Options = Options(),
    keep: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Table:
    """Reads `columns` (new name -> name in the file) of a file, or of a folder's files sorted by name.

    Files whose name starts with "." or "_" are left out, as the writers of parts put their bookkeeping there.

    Args:
        keep: column of the file -> the values, as text, of the rows to mark in `Table.kept`; by default all rows.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file is empty, damaged, of an unknown kind, lacks a column or has it twice; says which.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "likes.csv"
        >>> _ = file.write_text("who,what\\nann,tea\\n")
        >>> read_table(file, {"user": "who"}, TABLE).frame["user"].to_list()
        ['ann']
    """
    files = _files(Path(path), format.suffixes)
    parts = [_read_part(file, columns, format, options, keep) for file in files]
    for file, part in zip(files[1:], parts[1:], strict=True):
        if part.schema != parts[0].schema:
            raise ValueError(f"{file}: its columns have the types {part.dtypes}, those of {files[0]} {parts[0].dtypes}")
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    frame = pl.concat(parts)
    typed = format.integers or files[0].name.endswith(PARQUET)
    return Table(frame.drop(KEPT), files, starts, typed, frame[KEPT])


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        if not files:
            raise ValueError(f"{path}: the folder holds no files")
    for file in files:
        if not file.is_file() or not file.name.endswith(suffixes):
            raise ValueError(f"{file}: expected a file that ends in {', '.join(suffixes)}")
    if len({file.name.endswith(PARQUET) for file in files}) > 1:
        raise ValueError(f"{path}: the folder holds both CSV and Parquet files")
    return files


def _read_part(
    file: Path, columns: Mapping[str, str], format: Format, options: Options, keep: Mapping[str, Collection[str]]
) -> pl.DataFrame:
    wanted = [*columns.values(), *keep]
    try:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
        frame = format.scan(file, wanted, options)
        present = frame.collect_schema().names()
        if missing := [column for column in wanted if column not in present]:
            raise ValueError(f"{file}: no column {missing[0]!r}; its columns are {', '.join(present)}")
        kept = [pl.col(column).cast(pl.String).is_in(list(values)) for column, values in keep.items()]
        selected = frame.select(
            *(pl.col(column).alias(name) for name, column in columns.items()),
            pl.all_horizontal(pl.lit(True), *kept).fill_null(False).alias(KEPT),
        )
        if format.integers:
            selected = selected.with_columns(cs.string().cast(pl.Int64, strict=False))
        selected = selected.with_columns(cs.string().replace("", None), cs.float().fill_nan(None))
        return selected.collect(engine="streaming")
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
        OSError,
        EOFError,
        UnicodeError,
        zlib.error,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file}: cannot be read as {_kind(file)} ({reason})") from None


def open_text(file: Path) -> TextIO:
    """The lines of a file, plain or gzip; bytes that are not UTF-8 do not stop it."""
    opened = gzip.open if file.name.endswith(".gz") else open
    return opened(file, "rt", encoding="utf-8", errors="replace", newline="\n")


def _kind(file: Path) -> str:
    ending = file.name.removesuffix(".gz").rpartition(".")[2]
    return {"parquet": "Parquet", "json": "JSON lines", "jsonl": "JSON lines"}.get(ending, "CSV")


def scan_table(file: Path, wanted: Collection[str], options: Options) -> pl.LazyFrame:
    """The rows of a CSV or Parquet file; refuses a wanted column that is there more than once."""
    frame = _scan(file, options.separator)
    present = frame.collect_schema().names()
    for column in wanted:  # polars renames the second of two columns of one name
        if f"{column}_duplicated_0" in present and _header(file, options.separator).count(column) > 1:
            raise ValueError(f"{file}: column {column!r} is there more than once: rename or remove one")
    return frame


def _header(file: Path, separator: str) -> tuple[str, ...]:
    """The names of the columns as the file has them, repeats and all."""
    if not file.name.endswith(CSV):
        return tuple(_scan(file, separator).collect_schema().names())
    return _scan(file, separator, has_header=False).head(1).collect().row(0)


def _scan(file: Path, separator: str, has_header: bool = True) -> pl.LazyFrame:
    if file.name.endswith(CSV):
        separator = "\t" if file.name.endswith((".tsv", ".tsv.gz")) else separator
        return pl.scan_csv(file, separator=separator, infer_schema=False, glob=False, has_header=has_header)
    if file.name.endswith(".gz"):
        with gzip.open(file) as content:
            return pl.scan_parquet(io.BytesIO(content.read()))
    return pl.scan_parquet(file, glob=False)


TABLE = Format(CSV + PARQUET, scan_table, "user", "item", "timestamp", "intent")
