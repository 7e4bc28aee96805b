"""Hypothesis strategies for the files that cafe reads: whatever their bytes, the command works or says in one line what is wrong.

Each target writes a file and runs the `cafe` command on it, in this process. Exit code 0, or 1 or 2 with one line `error: ...`, is right;
anything else is a defect: another exception, more lines, half-written results. Files with checksums are also altered inside and sealed
again, as somebody who wants to do harm would.
"""

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hypothesis import strategies as st

from cafe import shards
from cafe.checkpoint import load_checkpoint, save_checkpoint
from cafe.cli import main
from cafe.config import Config
from cafe.data.dataset import Dataset, Sequences
from cafe.data.folders import checksum, seal
from cafe.evaluation import Evaluation, _checksum
from cafe.shards import TABLE
from cafe.train import fit
from tests.fuzz_kernels import Draw

VALUES = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.0, 1e308, float("inf"), float("nan"), "", "x", "..", "\0",
    "../../x", "cafe", "/dev/zero", "\ud800", [], {}, [[]], [None], {"a": 1}, ["x"] * 3,
]  # fmt: skip
CELLS = [
    "", "a", "b", "7", "007", "-1", "1e3", "nan", "inf", "NULL", '"', '""', '"a', 'a"b', '"a,b"', '"a\nb"', " ", "\t", "\0", "é", "\ufeff",
    "2020-01-01", "2020-13-01", "2020-01-01T00:00:00.123456789Z", "99999999999999999999", "1.7976931348623157e309", "x" * 200, "[", "a:b",
]  # fmt: skip
JSON_CELLS = [
    '"A1"', "7", "1.5", "null", "true", "[]", "{}", '[["Beauty", "Lips"]]', '["Beauty", "Lips"]', '[["a"], null, 3]', "{'a': 1}", "{1, 2}",
    "b'x'", "...", "(1,)", "1j", '"\\ud800"', "[" * 300, "[" * 5000, "1" * 5000, "-" * 3000 + "1", '"\\u0000"', "NaN", "'A1'",
    "1_0", "f'{1}'", "''.x", "[1][0]", "{**{}}",
]  # fmt: skip


@functools.cache
def folder() -> Path:
    """A dataset, a finished run with its evaluation, and room for files; removed at the end of the process."""
    torch.set_num_threads(1)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    path = Path(tempfile.mkdtemp(dir=base, prefix="cafe-fuzz-"))
    import atexit

    atexit.register(shutil.rmtree, path, ignore_errors=True)
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 7, 12)
    Dataset(
        Sequences(np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 9, lengths.sum()).astype(np.int32)),
        (np.arange(9) % 3).astype(np.int32),
        pl.Series([f"u{i}" for i in range(12)]),
        pl.Series([f"i{i}" for i in range(9)]),
        pl.Series(["x", "y", "z"]),
    ).save(path / "data")
    config = Config.make("cafe", "best", dim=4, max_len=4, batch_size=8, epochs=2, negatives=4)
    fit(config, Dataset.load(path / "data"), path / "run", data=path / "data")
    cafe("evaluate", "--run", path / "run", "--json")
    (path / "sharded" / "shards").mkdir(parents=True)
    tensors, state = load_checkpoint(path / "run" / "best.safetensors")
    table, names = tensors.pop(TABLE), [f"best-1-aa-{part}.safetensors" for part in ("all", "rows-0", "rows-5")]
    save_checkpoint(path / "sharded" / "shards" / names[0], tensors, state)
    parts = [[names[1], 0, 5], [names[2], 5, 9]]
    for name, first, stop in parts:
        own = {"run": state["run"], "step": 1, "rows": [first, stop]}
        save_checkpoint(path / "sharded" / "shards" / str(name), {TABLE: table[first:stop]}, own)
    meta = {
        "format": shards.FORMAT,
        "version": shards.VERSION,
        "step": 1,
        "rows": 9,
        "common": names[0],
        "shards": parts,
    }
    (path / "sharded" / "best.json").write_bytes(seal(meta))
    return path


class Wrong(AssertionError):
    """A command that neither worked nor said in one line what is wrong."""


def cafe(*arguments: object) -> bool:
    """Runs the command; True where it worked."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["cafe", *map(str, arguments)]
    import cafe.cli

    consoles = cafe.cli.out_console, cafe.cli.err_console
    code: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            for console, stream in zip(consoles, (out, err), strict=True):
                console.file = stream
            main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
        for console in consoles:
            console.file = None
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if code in (0, None):
        return True
    if code not in (1, 2) or len(errors) != 1 or out.getvalue():
        raise Wrong(f"exit code {code!r}, {out.getvalue()!r}, {err.getvalue()!r}")
    return False


def damaged(draw: Draw, content: bytes) -> bytes:
    """Some bytes changed, cut, repeated or put in."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            return content
        at, size = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "insert"]))
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + size :]
        elif kind == "repeat":
            content = content[:at] + content[at : at + size] * 2 + content[at + size :]
        else:
            content = content[:at] + draw(st.binary(max_size=16)) + content[at:]
    return content


def altered(draw: Draw, value: Any) -> Any:
    """A copy of a JSON value in which something, somewhere, is another, gone or new."""
    value = json.loads(json.dumps(value))
    at = value
    while isinstance(at, (dict, list)) and at:
        key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.integers(0, 3)) == 0:
            if draw(st.integers(0, 4)) == 0:
                del at[key]
            elif draw(st.integers(0, 9)) == 0 and isinstance(at, dict):
                at["new"] = draw(st.sampled_from(VALUES))
            else:
                at[key] = draw(st.sampled_from(VALUES))
            return value
        at = at[key]
    return draw(st.sampled_from(VALUES))


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Any:
    """The file is `content` in the block; afterwards all of its folder is as before."""
    before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    path.write_bytes(content)
    try:
        yield
    finally:
        for entry in set(path.parent.iterdir()) - before.keys():
            entry.unlink()
        for entry, former in before.items():
            entry.write_bytes(former)


def lines_of(draw: Draw, cells: list[str], header: list[str], separator: str) -> bytes:
    rows = [header] if draw(st.integers(0, 9)) else []
    for _ in range(draw(st.integers(0, 6))):
        rows.append([draw(st.sampled_from(cells)) for _ in range(draw(st.sampled_from([len(header)] * 5 + [0, 1, 9])))])
    return (
        draw(st.sampled_from(["\n", "\r\n", "\n\n"]))
        .join(separator.join(row) for row in rows)
        .encode("utf-8", "replace")
    )


def good_rows(separator: str, header: list[str]) -> bytes:
    rows = [header, *([f"u{i % 4}", f"i{i % 5}", str(i), f"c{i % 2}"][: len(header)] for i in range(12))]
    return "\n".join(separator.join(row) for row in rows).encode()


def prepare(
    draw: Draw, interactions: str, content: bytes, items: str | None, items_content: bytes, *options: str
) -> bool:
    place = folder() / "files"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, part in ((interactions, content), (items, items_content)):
        if name is not None:
            part = gzip.compress(part) if name.endswith(".gz") else part
            (place / name).write_bytes(damaged(draw, part) if draw(st.integers(0, 3)) == 0 else part)
    given = ["--interactions", place / interactions, "--out", place / "out", *options]
    more = draw(
        st.sampled_from(
            [[], ["--drop-incomplete"], ["--duplicates", "exact"], ["-k", "2"], ["--duplicates", "last", "--json"]]
        )
    )
    worked = cafe("prepare", *given, *([] if items is None else ["--items", place / items]), *more)
    left = {entry.name for entry in place.iterdir()} - {interactions, items}
    if left - {"out"} or (left and not worked):
        raise Wrong(f"prepare left {left}, worked: {worked}")
    return worked


def tables(draw: Draw) -> bool:
    """`cafe prepare` of CSV and Parquet."""
    ends = [".csv", ".csv.gz", ".tsv", ".parquet", ".parquet.gz"]
    names, contents = [], []
    for stem, header in (("buys", ["user", "item", "timestamp"]), ("items", ["item", "intent"])):
        end = draw(st.sampled_from(ends))
        separator = "\t" if "tsv" in end else ","
        if "parquet" in end:
            kinds = [
                pl.String,
                pl.Int64,
                pl.UInt64,
                pl.Float32,
                pl.Date,
                pl.Datetime("ns"),
                pl.Boolean,
                pl.Categorical,
                pl.Binary,
                pl.Null,
            ]
            rows = draw(st.integers(0, 12))
            frame = pl.DataFrame(
                {name: [str(i % 5) for i in range(rows)] for name in header}, {name: pl.String for name in header}
            )
            for name in header:
                kind = draw(st.sampled_from([pl.String, pl.Int64, *kinds]))
                column = frame[name] if kind in (pl.String, pl.Categorical, pl.Binary) else frame[name].cast(pl.Int64)
                if kind == pl.Null:
                    frame = frame.with_columns(pl.Series(name, [None] * rows, kind))
                elif kind in (pl.Categorical, pl.Binary):
                    frame = frame.with_columns(column.cast(kind))
                else:
                    frame = frame.with_columns(
                        column.cast(pl.Int32).cast(kind) if kind == pl.Date else column.cast(kind)
                    )
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            content = buffer.getvalue()
        else:
            content = lines_of(draw, CELLS, header, separator) if draw(st.booleans()) else good_rows(separator, header)
        names.append(stem + end), contents.append(content)
    if draw(st.integers(0, 4)) == 0:
        contents[0] = draw(st.binary(max_size=200))
    return prepare(draw, names[0], contents[0], names[1] if draw(st.booleans()) else None, contents[1])


def raw(draw: Draw) -> bool:
    """`cafe prepare` of the raw formats."""
    format = draw(st.sampled_from(["amazon", "tmall", "ijcai16", "recbole"]))
    end = draw(st.sampled_from(["", ".gz"]))
    if format == "amazon":

        def objects(keys: list[str]) -> bytes:
            rows = []
            for i in range(draw(st.integers(0, 8))):
                cells = [draw(st.sampled_from([f'"{key[0]}{i % 3}"', *JSON_CELLS])) for key in keys]
                row = ", ".join(f'"{key}": {cell}' for key, cell in zip(keys, cells, strict=True))
                rows.append(draw(st.sampled_from([f"{{{row}}}"] * 8 + [row, "[]", "{}", "", "{" + row])))
            return "\n".join(rows).encode("utf-8", "replace")

        reviews = "\n".join(
            f'{{"reviewerID": "u{i % 4}", "asin": "i{i % 5}", "unixReviewTime": {i}}}' for i in range(12)
        ).encode()
        content = objects(["reviewerID", "asin", "unixReviewTime"]) if draw(st.booleans()) else reviews
        meta = objects(["asin", draw(st.sampled_from(["category", "categories"]))])
        level = str(draw(st.sampled_from([1, 2, -1, -2, -9])))
        return prepare(draw, f"r.json{end}", content, f"m.json{end}", meta, "--format", format, "--intent-level", level)
    if format == "recbole":
        header = ["user_id:token", "item_id:token", "timestamp:float"]
        items = ["item_id:token", "categories:token_seq"]
        content = lines_of(draw, CELLS, header, "\t") if draw(st.booleans()) else good_rows("\t", header)
        return prepare(
            draw, f"x.inter{end}", content, f"x.item{end}", lines_of(draw, CELLS, items, "\t"), "--format", format
        )
    header = (
        ["user_id", "item_id", "time_stamp", "seller_id"]
        if format == "tmall"
        else ["use_ID", "ite_ID", "time", "sel_ID"]
    )
    cells = [*CELLS, "1", "2", "3", "4", "20150101", str(2**63), "-0", "+1", "1 "]
    keep = draw(st.sampled_from([[], ["--keep", f"{header[3]}=1,2"], ["--keep", "nothing=1"]]))
    return prepare(draw, f"log.csv{end}", lines_of(draw, cells, header, ","), None, b"", "--format", format, *keep)


def command(draw: Draw) -> bool:
    """One of the commands that read a run."""
    run = folder() / "run"
    return cafe(
        *draw(
            st.sampled_from(
                [
                    ("recommend", "--run", run, "--user", "u1", "--json"),
                    ("evaluate", "--run", run, "--protocol", "full", "--max-users", "5", "--json"),
                    ("train", "--resume", "--out", run, "--json"),
                ]
            )
        )
    )


def checkpoint(draw: Draw) -> bool:
    """best.safetensors and last.safetensors, damaged, or with other content and right checksums."""
    path = folder() / "run" / draw(st.sampled_from(["best.safetensors", "last.safetensors"]))
    with changed(draw, path):
        return command(draw)


@contextlib.contextmanager
def changed(draw: Draw, path: Path) -> Iterator[None]:
    """A file of safetensors, damaged, or with other content and right checksums."""
    content = path.read_bytes()
    if draw(st.booleans()):
        content = damaged(draw, content)
    else:
        tensors, state = load_checkpoint(path)
        if draw(st.booleans()):
            state = altered(draw, state)
        else:
            name = draw(st.sampled_from(sorted(tensors)))
            x = tensors[name]
            change = draw(st.sampled_from(["gone", "name", "dtype", "flat", "cut", "nan", "large", "negative"]))
            tensors = {key: value for key, value in tensors.items() if key != name or change not in ("gone", "name")}
            if change == "name":
                tensors[
                    draw(
                        st.sampled_from(
                            ["x", "model.", "optimizer.tables", "optimizer.tables.9.step", "optimizer.tables.x.y"]
                        )
                    )
                ] = x
            elif change == "dtype":
                tensors[name] = x.to(
                    draw(st.sampled_from([torch.float64, torch.int64, torch.uint8, torch.bfloat16, torch.bool]))
                )
            elif change in ("flat", "cut"):
                tensors[name] = x.reshape(-1) if change == "flat" else x[:-1] if x.dim() else x.reshape(1)
            elif change in ("nan", "large", "negative"):
                value = {"nan": float("nan"), "large": 1e30, "negative": -5.0}[change]
                whole = not x.is_floating_point()
                tensors[name] = torch.full_like(
                    x, (2**31 - 1 if value > 0 else -5) if whole and x.dtype != torch.bool else value
                )
        with replaced(path, content):
            save_checkpoint(path, tensors, state)
            content = path.read_bytes()
    with replaced(path, content):
        yield


def sharded(draw: Draw) -> bool:
    """best.json and the files of several ranks, damaged, or altered and sealed again; `python -m cafe.distributed --export`."""
    run = folder() / "sharded"
    path = draw(st.sampled_from([run / "best.json", *sorted((run / "shards").iterdir())]))
    if path.suffix == ".json" and draw(st.integers(0, 3)):
        meta = json.loads(path.read_bytes())
        del meta["checksum"]
        meta = altered(draw, meta)
        change = replaced(path, seal(meta) if isinstance(meta, dict) else json.dumps(meta).encode())
    else:
        change = replaced(path, damaged(draw, path.read_bytes())) if path.suffix == ".json" else changed(draw, path)
    before = sorted((run / "shards").iterdir())
    try:
        with change:
            shards.export(run)
            tensors, _ = load_checkpoint(run / "best.safetensors")
            if tensors[TABLE].shape[0] != 9:
                raise Wrong(f"a table of {tuple(tensors[TABLE].shape)}")
    except (ValueError, OSError) as error:
        if "\n" in str(error):
            raise Wrong(str(error)) from error
        return False
    finally:
        (run / "best.safetensors").unlink(missing_ok=True)
        if sorted((run / "shards").iterdir()) != before:
            raise Wrong("files were left or removed")
    return True


def run(draw: Draw) -> bool:
    """config.json of the run and the files of the dataset, damaged, or altered and sealed again."""
    name = draw(
        st.sampled_from(["run/config.json", "data/meta.json", "data/meta.json", "data/items.npy", "data/users.parquet"])
    )
    path = folder() / name
    content = original = path.read_bytes()
    if draw(st.integers(0, 2)) == 0 or not name.endswith("json"):
        content = damaged(draw, content)
    else:
        meta = json.loads(content)
        del meta["checksum"]
        meta = altered(draw, meta)
        content = seal(meta) if isinstance(meta, dict) else json.dumps(meta).encode()
    with replaced(path, content):
        if name.endswith("json"):
            return command(draw)
        marker = folder() / "data" / "meta.json"
        meta = json.loads(marker.read_bytes())
        del meta["checksum"]
        if draw(st.booleans()):
            name = name.removeprefix("data/")
            if name == "items.npy" and draw(st.booleans()):
                array = np.load(io.BytesIO(original)) if draw(st.booleans()) else np.arange(40)
                np.save(
                    path,
                    array.astype(draw(st.sampled_from([np.int32, np.int64, np.float32, ">i4"])))
                    * draw(st.sampled_from([1, -1, 99])),
                )
            meta["checksums"][name] = checksum(path)
        before = marker.read_bytes()
        marker.write_bytes(seal(meta))
        try:
            return command(draw)
        finally:
            marker.write_bytes(before)


def evaluation(draw: Draw) -> bool:
    """A kept evaluation, damaged, or altered and sealed again; `cafe report`-like reading of it."""
    path = folder() / "run" / Evaluation.file_name("test", "aligned")
    content = path.read_bytes()
    if draw(st.booleans()):
        content = damaged(draw, content)
    else:
        with np.load(io.BytesIO(content)) as file:
            arrays: dict[str, Any] = dict(file)
        meta = json.loads(str(arrays.pop("meta")))
        del meta["checksum"]
        if draw(st.booleans()):
            meta = altered(draw, meta)
        else:
            name = draw(st.sampled_from(sorted(arrays)))
            x = arrays.pop(name)
            kinds = [np.float64, np.int32, np.bool_, "U4", ">i8"]
            change = draw(st.sampled_from(["gone", "dtype", "cut", "more", "negative", "name"]))
            if change == "name":
                arrays[draw(st.sampled_from(["x", "greater/", "equal/x", "model", "greater/../x"]))] = x
            elif change != "gone":
                arrays[name] = {
                    "dtype": x.astype(draw(st.sampled_from(kinds))), "cut": x[:-1], "more": x[None], "negative": -5 - x
                }[change]  # fmt: skip
        if isinstance(meta, dict):
            with contextlib.suppress(Exception):
                meta["checksum"] = _checksum(meta, arrays)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, meta=np.array(json.dumps(meta)), **arrays)
        content = buffer.getvalue()
    with replaced(path, content):
        try:
            Evaluation.load(path).summary(resamples=2)
        except (ValueError, OSError):
            return False
    return True


def experiment(draw: Draw) -> bool:
    """A TOML file for `cafe compare --config`; what it names stays inside --out. Nothing is trained: the dataset is missing."""
    keys = ["baseline", "seeds", "protocols", "common", "systems", "x", "model", "preset", "dim", "seed", "dropout", "loss", "[systems.A]",
            "[common]", '[systems."../../x"]', "[systems.'a\\..']", "[[systems]]", "[systems.B.C]"]  # fmt: skip
    values = ['"sasrec"', '"A"', '"best"', "1", "-1", "0", "1e400", "nan", "true", "[]", '["aligned"]', "[[1]]", "{}", "{a=1}",
              "10" * 20, "9" * 400, '"""', "'", "2020-01-01", "[" * 2000, "0x1f", '"\\ud800"', '"\\u0000"', "1_0",
              "{model='cafe', dim=8}"]  # fmt: skip
    lines = [
        key if key.startswith("[") else f"{key} = {draw(st.sampled_from(values))}"
        for key in draw(st.lists(st.sampled_from(keys), max_size=8))
    ]
    content = "\n".join(lines).encode()
    if draw(st.booleans()):
        content = (
            b'seeds = 2\n[common]\ndim = 8\n[systems.A]\nmodel = "sasrec"\n[systems."B c"]\nmodel = "cafe"\n' + content
        )
    if draw(st.integers(0, 2)) == 0:
        content = damaged(draw, content)
    file = folder() / "x.toml"
    file.write_bytes(content)
    return cafe("compare", "--config", file, "--data", folder() / "missing", "--out", folder() / "out")


TARGETS = {f.__name__: f for f in (tables, raw, checkpoint, sharded, run, evaluation, experiment)}
