"""Reads columns of a CSV or Parquet file, plain or gzip, or of a folder of such parts, in the order of the rows.

CSV columns stay text, so that an id such as 007 is not turned into 7; `cafe.data.prepare` decides on types. Empty text,
quoted or not, and NaN are missing values (null).
"""

import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import polars.selectors as cs

CSV = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = (".parquet", ".parquet.gz")


@dataclass(frozen=True)
class Table:
    """Rows read from one or several files.

    Attributes:
        frame: the wanted columns under their new names, all files one after the other.
        files: the files, in reading order.
        starts: int64 (files), the row of `frame` at which each file starts.
        typed: False for CSV, where all columns are text because the file knows no types.
    """

    frame: pl.DataFrame
    files: list[Path]
    starts: np.ndarray
    typed: bool

    def where(self, row: int) -> str:
        """Where row `row` of `frame` came from, for an error message; a file's rows count from 1 after its header."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"row {row - self.starts[part] + 1:,} of {self.files[part]}"


def read_table(path: str | Path, columns: Mapping[str, str], separator: str = ",") -> Table:
    """Reads `columns` (new name -> name in the file) of a file, or of a folder's files sorted by name.

    Files whose name starts with "." or "_" are left out, as the writers of parts put their bookkeeping there.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file is empty, damaged, of an unknown kind, lacks a column or has it twice; says which.

    Example:
        >>> import tempfile; file = Path(tempfile.mkdtemp()) / "likes.csv"
        >>> _ = file.write_text("who,what\\nann,tea\\n")
        >>> read_table(file, {"user": "who"}).frame["user"].to_list()
        ['ann']
    """
    files = _files(Path(path))
    parts = [_read_part(file, columns, separator) for file in files]
    for file, part in zip(files[1:], parts[1:], strict=True):
        if part.schema != parts[0].schema:
            raise ValueError(f"{file}: its columns have the types {part.dtypes}, those of {files[0]} {parts[0].dtypes}")
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    return Table(pl.concat(parts), files, starts, not files[0].name.endswith(CSV))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        if not files:
            raise ValueError(f"{path}: the folder holds no files")
    for file in files:
        if not file.is_file() or not file.name.endswith(CSV + PARQUET):
            raise ValueError(f"{file}: expected a file that ends in {', '.join(CSV + PARQUET)}")
    if len({file.name.endswith(CSV) for file in files}) > 1:
        raise ValueError(f"{path}: the folder holds both CSV and Parquet files")
    return files


def _read_part(file: Path, columns: Mapping[str, str], separator: str) -> pl.DataFrame:
    try:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty")
        frame = _scan(file, separator)
        present = frame.collect_schema().names()
        if missing := [column for column in columns.values() if column not in present]:
            raise ValueError(f"{file}: no column {missing[0]!r}; its columns are {', '.join(present)}")
        for column in columns.values():  # polars renames the second of two columns of one name
            if f"{column}_duplicated_0" in present and _header(file, separator).count(column) > 1:
                raise ValueError(f"{file}: column {column!r} is there more than once: rename or remove one")
        selected = frame.select(pl.col(column).alias(name) for name, column in columns.items())
        selected = selected.with_columns(cs.string().replace("", None), cs.float().fill_nan(None))
        return selected.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file}: cannot be read as {_kind(file)} ({reason})") from None


def _kind(file: Path) -> str:
    return "CSV" if file.name.endswith(CSV) else "Parquet"


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
