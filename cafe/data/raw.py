"""The raw files of published data sets: FORMATS is the list, docs/data.md tells what each holds and what the paper leaves open.

- amazon: reviews of the Amazon data sets of 2014 and 2018, one JSON object a line; their metadata likewise, which in 2014 are
  Python literals. The intent is the category: the item's (first) path, cut at `intent_level` (1: the root; -1: the whole
  path; -2: all but the finest category; a shorter path stays whole).
- tmall, ijcai16: the logs of the contests IJCAI-15 and IJCAI-16, CSV of whole numbers; the intent is the seller.
- recbole: RecBole's atomic files, tab-separated, with a header of name:type. A sequence (token_seq) is taken for a path.
"""

import ast
import json
import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from cafe.data.files import TABLE, Format, Options, open_text

JSON = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
CATEGORY, CATEGORIES = "category", "categories"  # a path (2018), a list of paths (2014)
JSON_TYPES = {CATEGORY: pl.List(pl.String), CATEGORIES: pl.List(pl.List(pl.String))}
TOO_MANY = " more"  # what follows the last column of the header
LINES = 50_000  # parsed at a time


def scan_json(file: Path, wanted: Collection[str], options: Options) -> pl.LazyFrame:
    """One object a line, all columns as text, `category` also from `categories`; a line that is no object has no values.

    polars reads strict JSON and refuses anything else; then each line is parsed by itself.
    """
    present: dict[str, None] = {}
    keys: dict[str, str] = {}
    missing = list(wanted)
    with open_text(file) as lines:
        while missing and (part := list(islice(lines, 1000))):  # a column may begin late
            present |= dict.fromkeys(key for row in map(_object, part) if row for key in row)
            if not present:
                break
            keys = {name: CATEGORIES if name == CATEGORY and name not in present else name for name in wanted}
            missing = [name for name, key in keys.items() if key not in present]
    if not present:
        raise ValueError(f"{file}: cannot be read as JSON lines (none of its first 1,000 lines is an object)")
    if missing:
        raise ValueError(f"{file}: no column {missing[0]!r}; its columns are {', '.join(present)}")
    schema = {key: JSON_TYPES.get(key, pl.String()) for key in keys.values()}
    columns = [_json_column(key, options).alias(name) for name, key in keys.items()]
    try:
        return pl.scan_ndjson(file, schema=schema).select(columns).collect(engine="streaming").lazy()
    except pl.exceptions.PolarsError:
        with open_text(file) as lines:
            return pl.concat(part.select(columns) for part in _parsed(lines, schema)).lazy()


def _json_column(key: str, options: Options) -> pl.Expr:
    if key not in JSON_TYPES:
        return pl.col(key)
    path = pl.col(key).list.first() if key == CATEGORIES else pl.col(key)
    # In some files of 2018 the path goes on with markup of the page and what stood behind it.
    markup = pl.element().str.starts_with("<").cast(pl.Int8).cum_max()
    return _intent(path.list.eval(pl.element().filter(markup == 0)), options)


def _parsed(lines: Iterable[str], schema: dict[str, Any]) -> Iterable[pl.DataFrame]:
    """The lines as frames, LINES at a time; polars skips blank lines, and so does this."""
    filled = (line for line in lines if not line.isspace())
    while batch := list(islice(filled, LINES)):
        objects = [_object(line) or {} for line in batch]
        yield pl.DataFrame({key: [_value(key, row.get(key)) for row in objects] for key in schema}, schema)


def _object(line: str) -> dict[str, Any] | None:
    """A line of JSON, or of a Python literal (which is read, never run)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in a literal
        for parse in (json.loads, ast.literal_eval):
            try:
                row = parse(line)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
            return row if isinstance(row, dict) else None
    return None


def _value(key: str, value: Any) -> Any:
    """The value as polars reads it: text as it is, anything else as JSON; a path as a list. What JSON has not is no value."""
    if key not in JSON_TYPES:
        return value if value is None or isinstance(value, str) else _json(value)
    path = value if isinstance(value, list) else []
    if path and isinstance(path[0], list):
        path = path[0]
    path = [name if isinstance(name, str) else _json(name, ensure_ascii=False) for name in path if name is not None]
    return path if key == CATEGORY else [path]


def _json(value: Any, **options: Any) -> str | None:
    """The value as JSON; None for a set, bytes and the like, which Python's literals know."""
    try:
        return json.dumps(value, **options)
    except (TypeError, ValueError, RecursionError):
        return None


def _intent(path: pl.Expr, options: Options) -> pl.Expr:
    """A path cut at the level, as one text; empty if the path is."""
    level, depth = options.intent_level, path.list.len().cast(pl.Int64)
    length = depth.clip(upper_bound=level) if level > 0 else (depth + level + 1).clip(lower_bound=1)
    return path.list.head(length).list.join(" > ")


def scan_delimited(file: Path, separator: str) -> pl.LazyFrame:
    """The rows of text without quotes; a row with more fields than the header has no values."""
    lines = pl.scan_csv(  # as one column: a row with too many fields would pass unnoticed otherwise
        file, separator="\0", quote_char=None, infer_schema=False, has_header=False, new_columns=["line"], glob=False
    ).filter(pl.col("line").str.len_bytes() > 0)
    header = "".join(lines.head(1).collect()["line"]).split(separator)
    fields = pl.col("line").str.split_exact(separator, len(header)).alias("fields")
    names = [*header, TOO_MANY]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{file}: column {twice[0]!r} is there more than once: rename or remove one")
    rows = lines.slice(1).select(fields.struct.rename_fields(names)).unnest("fields")
    return rows.select(pl.when(pl.col(TOO_MANY).is_null()).then(pl.col(name)).alias(name) for name in header)


def scan_log(file: Path, wanted: Collection[str], options: Options) -> pl.LazyFrame:
    return scan_delimited(file, ",")


def scan_atomic(file: Path, wanted: Collection[str], options: Options) -> pl.LazyFrame:
    """Columns under their names without the type; sequences are cut as paths are."""
    frame = scan_delimited(file, "\t")
    header = frame.collect_schema().names()
    if untyped := [column for column in header if ":" not in column]:
        raise ValueError(f"{file}: column {untyped[0]!r} of the header is not of the form name:type")
    sequences = [column for column in header if column.endswith(":token_seq")]
    filled = pl.element().filter(pl.element() != "")  # separators may be doubled or trail
    return frame.with_columns(
        _intent(pl.col(column).str.split(options.seq_separator).list.eval(filled), options) for column in sequences
    ).rename({column: column.rpartition(":")[0] for column in header})


LONG = ", or more fields than the header"
LOG = Format(
    (".csv", ".csv.gz"), scan_log, "user_id", "item_id", "time_stamp", "seller_id",
    integers=True, names_intents=True, wrong=f", or not a whole number{LONG}",
)  # fmt: skip
FORMATS = {
    "table": TABLE,
    "amazon": Format(
        JSON, scan_json, "reviewerID", "asin", "unixReviewTime", CATEGORY, wrong=", or the line is not a JSON object"
    ),
    "tmall": LOG,
    "ijcai16": replace(LOG, user="use_ID", item="ite_ID", time="time", intent="sel_ID"),
    "recbole": Format(
        (".inter", ".inter.gz", ".item", ".item.gz"), scan_atomic, "user_id", "item_id", "timestamp", "categories", wrong=LONG
    ),
}  # fmt: skip
