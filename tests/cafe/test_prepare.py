"""Files to datasets: every format gives the same, against a plain-Python reference, and wrong files get one clear line."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.dataset import Dataset, Sequences
from cafe.data.folders import new_folder
from cafe.data.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore:no items file", "ignore:1 item without", "ignore:no user has 3")
ROWS = [
    ("ann", "pot", 2),
    ("bob", "tea", 9),
    ("ann", "tea", 1),
    ("ann", "tea", 2),
    ("bob", "cup", 3),
    ("ann", "cup", 7),
]
ITEMS = "item,intent\ntea,drinks\npot,kitchen\n"


def csv(rows):
    return "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows)


def histories(dataset):
    return {
        user: [dataset.item_ids[int(i)] for i in dataset.sequences[number]]
        for number, user in enumerate(dataset.user_ids.to_list())
    }


def reference(rows, min_count, min_length):
    """Sort by time, ties in file order; drop rare items and short users until none is left."""
    rows = sorted(rows, key=lambda row: row[2])
    while True:
        users, items = [r[0] for r in rows], [r[1] for r in rows]
        kept = [r for r in rows if users.count(r[0]) >= min_length and items.count(r[1]) >= min_count]
        if len(kept) == len(rows):
            return {user: [i for u, i, _ in rows if u == user] for user in sorted(set(users))}
        rows = kept


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz"), st.integers(0, 5)), min_size=1, max_size=40
    ),
    min_count=st.integers(1, 3),
    min_length=st.integers(1, 3),
)
def test_equals_the_reference(tmp_path_factory, rows, min_count, min_length):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text(csv(rows))
    expected = reference(rows, min_count, min_length)
    left = {item for row in expected.values() for item in row}
    if len(expected) < 2 or len(left) < 2:
        with pytest.raises(ValueError, match="two of each are the least"):
            prepare(path, min_item_count=min_count, min_sequence_length=min_length)
    else:
        assert histories(prepare(path, min_item_count=min_count, min_sequence_length=min_length)) == expected


def test_all_formats_give_the_same(tmp_path):
    text = csv(ROWS)
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    pl.read_csv(tmp_path / "a.csv").write_parquet(tmp_path / "a.parquet")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "0.csv").write_text(csv(ROWS[:2]))
    (parts / "1.csv").write_text(csv(ROWS[2:]))
    (tmp_path / "items.csv").write_text(ITEMS)
    made = [
        prepare(path, tmp_path / "items.csv")
        for path in (tmp_path / "a.csv", tmp_path / "a.csv.gz", tmp_path / "a.parquet", parts)
    ]
    assert len({dataset.fingerprint for dataset in made}) == 1
    dataset = made[0]
    assert histories(dataset) == {"ann": ["tea", "pot", "tea", "cup"], "bob": ["cup", "tea"]}
    intents = {
        item: dataset.intent_ids[int(dataset.item_intent[n])] for n, item in enumerate(dataset.item_ids.to_list())
    }
    assert intents == {"tea": "drinks", "pot": "kitchen", "cup": "unknown"}
    assert any("unknown" in warning for warning in dataset.preparation["warnings"])
    assert made[0].stats()["users_too_short_to_evaluate"] == 1


def test_numbers_stay_numbers(tmp_path):
    (tmp_path / "a.csv").write_text(csv([(7, 10, 1), (7, 9, 2), (12, 9, 1)]))
    dataset = prepare(tmp_path / "a.csv", out=tmp_path / "out")
    assert dataset.user_ids.to_list() == [7, 12]
    assert Dataset.load(tmp_path / "out").item_ids.to_list() == [9, 10]


WRONG = {
    "no column": (b"user,thing,timestamp\na,b,1\n", "item"),
    "empty": (b"", "empty"),
    "header only": (b"user,item,timestamp\n", "a.csv"),
    "text for a number": (csv([*ROWS, ("ann", "pot", "soon")]).encode(), "soon"),
    "one user": (csv(ROWS[:1]).encode(), "two of each"),
    "no timestamp": (csv([*ROWS, ("ann", "pot", "")]).encode(), "timestamp"),
    "truncated": (gzip.compress(csv(ROWS * 100).encode())[:-20], "a.csv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(tmp_path, name):
    content, word = WRONG[name]
    path = tmp_path / ("a.csv.gz" if name == "truncated" else "a.csv")
    path.write_bytes(content)
    former = prepare_former(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "cafe.cli", "prepare", "--interactions", path, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert done.stdout == ""
    assert Dataset.load(tmp_path / "out").fingerprint == former
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, "former.csv", "out"])


def prepare_former(folder):
    (folder / "former.csv").write_text(csv(ROWS))
    return prepare(folder / "former.csv", out=folder / "out").fingerprint


def test_refuses_to_replace_somebody_elses_folder(tmp_path):
    (tmp_path / "a.csv").write_text(csv(ROWS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        prepare(tmp_path / "a.csv", out=tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_damaged_datasets_are_refused_by_name(tmp_path):
    prepare_former(tmp_path)
    for name in ("items.npy", "indptr.npy", "item_intent.npy", "users.parquet", "items.parquet", "intents.parquet"):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        for damaged in (content[:-1], bytes([*content[:-1], content[-1] ^ 1]), b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=name):
                Dataset.load(tmp_path / "out")
        path.write_bytes(content)
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"version": 0}))
    with pytest.raises(ValueError, match="format version 0"):
        Dataset.load(tmp_path / "out")


def test_splits(tmp_path):
    rows = [("a", f"i{n}", n) for n in range(5)] + [("b", "i0", 0), ("b", "i1", 1)]
    (tmp_path / "a.csv").write_text(csv(rows))
    made = prepare(tmp_path / "a.csv")
    assert [row.tolist() for row in made.train()] == [[0, 1, 2], [0, 1]]
    valid, test = made.holdout("valid"), made.holdout("test")
    assert valid.users.tolist() == test.users.tolist() == [0]
    assert (valid.histories[0].tolist(), valid.answers.tolist()) == ([0, 1, 2], [3])
    assert (test.histories[0].tolist(), test.answers.tolist()) == ([0, 1, 2, 3], [4])
    assert np.array_equal(made.train_counts(), [2, 2, 1, 0, 0])


def test_warns_of_what_is_missing(tmp_path):
    (tmp_path / "a.csv").write_text(csv(ROWS[:2]))
    (tmp_path / "items.csv").write_text(ITEMS.replace("tea,drinks\n", ""))
    with (
        pytest.warns(UserWarning, match="no items file"),
        pytest.warns(UserWarning, match="no user has 3 interactions"),
    ):
        prepare(tmp_path / "a.csv")
    with pytest.warns(UserWarning, match="1 item without an intent"), pytest.warns(UserWarning, match="no user has"):
        prepare(tmp_path / "a.csv", tmp_path / "items.csv")


def prepare_times(folder, times):
    """Ann's items i0, i1, ... in file order at `times`, in the order that the dataset gives them."""
    rows = [("ann", f"i{n}", time) for n, time in enumerate(times)] + [("bob", "i0", times[0])]
    (folder / "times.csv").write_text(csv(rows))
    return histories(prepare(folder / "times.csv"))["ann"]


@pytest.mark.parametrize(
    "times",
    [
        ["2020-02-02T10:00:00.123456789", "2020-02-02T10:00:00.123456788", "2020-02-02T10:00:00"],
        ["2020-02-02T10:00:00.1234567890", "2020-02-02T10:00:00.123456700", "1969-12-31T23:59:59.999999999"],
        ["2020-02-02T10:00:00.123456789+01:00", "2020-02-02T09:00:00.123456788Z", "2020-02-02T10:00:00+02:00"],
        ["9999-12-31T00:00:00.123456", "2020-02-02T10:00:00.0000000", "0001-01-01T00:00:00"],
        ["2020-02-02T10:01", "2020-02-02T10:00", "2020-02-02T09:59"],
        ["1700000000000000003", "1700000000000000002", "1700000000000000001"],
        ["36893488147419103232", "18446744073709551616", "1.5"],
        ["1700000000.25", "1700000000", "1.0"],
    ],
)
def test_fine_timestamps_keep_their_order(tmp_path, times):
    assert prepare_times(tmp_path, times) == ["i2", "i1", "i0"]


@pytest.mark.parametrize(
    ("times", "row"),
    [
        (["2020-02-02T10:00:00", "2020-02-02T10:00:00.1234567891"], 2),
        (["2020-02-02T10:00:00.123456789", "9999-12-31T00:00:00"], 2),
        (["9223372036854775810", "9223372036854775809"], 2),
        (["1700000000000000002", "1.5", "1700000000000000001"], 3),
        (["1700000000.123456789", "1700000000.123456788"], 2),
    ],
)
def test_timestamps_that_would_lose_their_order_are_refused(tmp_path, times, row):
    with pytest.raises(ValueError, match=rf"'timestamp', row {row} of .*: '{times[row - 1]}' would be rounded"):
        prepare_times(tmp_path, times)


def test_numbers_written_differently_are_one_timestamp(tmp_path):
    assert prepare_times(tmp_path, ["1.50", "1.5", "1", "1e0"]) == ["i2", "i3", "i0", "i1"]


def test_a_bad_timestamp_is_compared_with_the_first_only_if_it_is_another(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 of .*: 'xx' is not a timestamp \(expected"):
        prepare_times(tmp_path, ["xx", "1"])
    with pytest.raises(
        ValueError, match=r"row 2 of .*: 'xx' is not a timestamp, or not of the kind of the first one, '1'"
    ):
        prepare_times(tmp_path, ["1", "xx"])


def test_quoted_and_unquoted_empty_values_are_both_missing(tmp_path):
    for number, empty in enumerate(("", '""')):
        for row in ((empty, "pot", 2), ("ann", empty, 2), ("ann", "pot", empty)):
            path = tmp_path / f"{number}.csv"
            path.write_text(csv([*ROWS, row]))
            with pytest.raises(ValueError, match=r"row 7 of .*no value"):
                prepare(path)
            made = prepare(path, drop_incomplete=True)
            assert made.preparation["dropped"]["incomplete_rows"] == 1
            assert histories(made) == reference(ROWS, 1, 1)


def test_a_column_that_is_there_twice_is_refused_if_it_is_used(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,item,timestamp\nann,pot,tea,1\nbob,tea,pot,1\n")
    with pytest.raises(ValueError, match="column 'item' is there more than once"):
        prepare(tmp_path / "a.csv")
    for unused in ("note,note", "note,item_duplicated_0"):
        (tmp_path / "a.csv").write_text(f"user,item,{unused},timestamp\nann,pot,x,y,1\nbob,tea,x,y,1\n")
        assert histories(prepare(tmp_path / "a.csv")) == {"ann": ["pot"], "bob": ["tea"]}


def test_a_parquet_nan_is_a_missing_timestamp(tmp_path):
    rows = pl.DataFrame([*ROWS, ("bob", "pot", 1)], schema=["user", "item", "timestamp"], orient="row")
    times = pl.Series([float(row[2]) for row in ROWS] + [float("nan")])
    rows.with_columns(times.alias("timestamp")).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 7 of .*no value"):
        prepare(tmp_path / "a.parquet")
    made = prepare(tmp_path / "a.parquet", drop_incomplete=True)
    assert made.preparation["dropped"]["incomplete_rows"] == 1
    assert histories(made) == reference(ROWS, 1, 1)


REPEATS = [("ann", "tea", 3), ("ann", "tea", 1), ("ann", "pot", 2), ("ann", "tea", 3), ("bob", "pot", 1)]


@pytest.mark.parametrize(
    ("duplicates", "ann", "dropped"),
    [
        ("keep", ["tea", "pot", "tea", "tea"], 0),
        ("exact", ["tea", "pot", "tea"], 1),
        ("first", ["tea", "pot"], 2),
        ("last", ["pot", "tea"], 2),
    ],
)
def test_duplicates(tmp_path, duplicates, ann, dropped):
    (tmp_path / "a.csv").write_text(csv(REPEATS))
    made = prepare(tmp_path / "a.csv", duplicates=duplicates)
    assert histories(made) == {"ann": ann, "bob": ["pot"]}
    assert made.preparation["dropped"]["duplicate_rows"] == dropped


def test_unknown_duplicates(tmp_path):
    with pytest.raises(ValueError, match="expected one of keep, exact, first, last"):
        prepare(tmp_path / "a.csv", duplicates="all")


@pytest.mark.parametrize("missing", [("", "pot", 3), ("ann", "", 3), ("ann", "pot", "")])
def test_incomplete_rows_are_refused_or_dropped(tmp_path, missing):
    (tmp_path / "a.csv").write_text(csv([missing, *ROWS]))
    with pytest.raises(ValueError, match=r"row 1 of .*no value \(1 such row; --drop-incomplete"):
        prepare(tmp_path / "a.csv")
    made = prepare(tmp_path / "a.csv", drop_incomplete=True)
    assert histories(made) == {"ann": ["tea", "pot", "tea", "cup"], "bob": ["cup", "tea"]}
    assert made.preparation["dropped"]["incomplete_rows"] == 1


@pytest.mark.parametrize(
    ("early", "middle", "late"),  # each before the next, though not as text or not in the order of the rows
    [
        ("2024-02-29", "2024-03-01", "2024-12-01"),
        ("2024-03-01T09:59:59.5", "2024-03-01T09:59:59.75", "2024-03-01T10:00:00.0"),
        ("2024-03-01 09:59:59", "2024-03-01 10:00:00", "2024-03-02 00:00:00"),
        ("2024-03-01 09:59", "2024-03-01 10:00", "2024-03-02 00:00"),
        ("2024-03-01T12:00:00+05:00", "2024-03-01T08:00:00+00:00", "2024-03-01T05:00:00-06:00"),
        ("9", "10", "100"),
        ("9.5", "10", "1e3"),
        ("-10", "-9", "0"),
    ],
)
def test_times_as_text(tmp_path, early, middle, late):
    (tmp_path / "a.csv").write_text(csv([("a", "z", late), ("a", "x", early), ("a", "y", middle), ("b", "x", early)]))
    assert histories(prepare(tmp_path / "a.csv")) == {"a": ["x", "y", "z"], "b": ["x"]}


def test_times_of_two_kinds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(csv([("a", "x", "2024-03-01"), ("a", "y", 5), ("b", "x", "2024-03-01")]))
    with pytest.raises(ValueError, match=r"row 2 of .*'5' is not a timestamp"):
        prepare(tmp_path / "a.csv")


FRAME = pl.DataFrame({"user": list("aaab"), "item": list("zxyx"), "timestamp": [30, 9, 10, 9]})


@pytest.mark.parametrize(
    "times",
    [pl.Int32, pl.UInt8, pl.Float64, pl.Date, pl.Datetime("ms"), pl.Datetime("us", "Europe/Berlin"), pl.Duration("ns")],
    ids=str,
)
@pytest.mark.parametrize("ids", [pl.String, pl.Categorical, pl.Enum(list("zyxba"))], ids=str)
def test_types_of_parquet(tmp_path, times, ids):
    FRAME.cast({"timestamp": times, "user": ids, "item": ids}).write_parquet(tmp_path / "a.parquet")
    made = prepare(tmp_path / "a.parquet")
    assert histories(made) == {"a": ["x", "y", "z"], "b": ["x"]}
    assert made.item_ids.to_list() == ["x", "y", "z"]


@pytest.mark.parametrize("ids", [pl.UInt64, pl.Int8])
def test_numbers_of_parquet_stay_numbers(tmp_path, ids):
    frame = FRAME.with_columns(pl.col("item").replace_strict({"z": 100, "y": 9, "x": 7}).cast(ids))
    frame.write_parquet(tmp_path / "a.parquet")
    assert prepare(tmp_path / "a.parquet").item_ids.to_list() == [7, 9, 100]


def test_separator_and_names_of_columns(tmp_path):
    """`user`, `item` and `timestamp` are there too, and mislead."""
    (tmp_path / "a.csv").write_text(
        "user;item;timestamp;who;what;when\n?;?;0;ann;pot;2\n?;!;9;ann;tea;1\n!;?;5;bob;tea;7\n"
    )
    (tmp_path / "items.csv").write_text("what;intent;name;seller\npot;?;tea;drinks\ntea;?;pot;kitchen\n")
    columns = {"user_col": "who", "item_col": "what", "time_col": "when", "intent_col": "seller", "separator": ";"}
    for name, tea in ((None, "kitchen"), ("name", "drinks")):
        made = prepare(tmp_path / "a.csv", tmp_path / "items.csv", **columns, items_item_col=name)
        assert histories(made) == {"ann": ["tea", "pot"], "bob": ["tea"]}
        assert made.intent_ids[int(made.item_intent[made.item_ids.to_list().index("tea")])] == tea


def test_the_first_intent_of_an_item_wins(tmp_path):
    (tmp_path / "a.csv").write_text(csv(ROWS))
    (tmp_path / "items.csv").write_text("item,intent\ntea,\ntea,zebra\npot,b\ntea,apple\npot,b\ncup,c\nfar,d\nfar,e\n")
    with pytest.warns(UserWarning, match="1 item listed with several intents: the first one is kept"):
        made = prepare(tmp_path / "a.csv", tmp_path / "items.csv")
    assert made.intent_ids.gather(made.item_intent).to_list() == ["c", "b", "zebra"]
    assert made.item_ids.to_list() == ["cup", "pot", "tea"]


@pytest.mark.parametrize(
    ("keep", "items"), [(False, ["cup", "pot", "tea"]), (True, ["ale", "cup", "pot", "tea", "zoo"])]
)
def test_items_that_nobody_had(tmp_path, keep, items):
    (tmp_path / "a.csv").write_text(csv(ROWS))
    (tmp_path / "items.csv").write_text("item,intent\nzoo,fun\ntea,drinks\npot,kitchen\ncup,kitchen\nale,drinks\n")
    made = prepare(tmp_path / "a.csv", tmp_path / "items.csv", keep_unseen_items=keep)
    assert made.item_ids.to_list() == items
    intents = dict(zip(items, made.intent_ids.gather(made.item_intent).to_list(), strict=True))
    everything = {"ale": "drinks", "cup": "kitchen", "pot": "kitchen", "tea": "drinks", "zoo": "fun"}
    assert intents == {item: everything[item] for item in items}
    assert histories(made) == {"ann": ["tea", "pot", "tea", "cup"], "bob": ["cup", "tea"]}
    assert made.preparation["dropped"]["unseen_items"] == (0 if keep else 2)


def test_statistics_by_hand(tmp_path):
    """6 interactions of 2 users, of whom bob has 2, with 3 of 4 items."""
    (tmp_path / "a.csv").write_text(csv(ROWS))
    (tmp_path / "items.csv").write_text("item,intent\ntea,drinks\npot,kitchen\ncup,kitchen\nale,drinks\n")
    assert prepare(tmp_path / "a.csv", tmp_path / "items.csv", keep_unseen_items=True).stats() == {
        "interactions": 6,
        "items": 4,
        "intents": 2,
        "sequences": 2,
        "mean_length": 3.0,
        "density": 0.75,
        "interactions_per_item": 1.5,
        "users_too_short_to_evaluate": 1,
    }


@pytest.mark.parametrize("moment", ["in the block", "in the last rename"])
def test_a_write_that_fails_keeps_the_former_folder(tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    names = ["marker.json", "part"]
    with new_folder(out, "marker.json", "thing", names) as folder:
        (folder / "marker.json").write_text('{"format": "thing"}')
        (folder / "part").write_text("former")
    rename = Path.rename

    def fail(self, target):
        if self.suffix == ".tmp":
            raise OSError("no space")
        return rename(self, target)

    if moment == "in the last rename":
        monkeypatch.setattr(Path, "rename", fail)

    def write():
        with new_folder(out, "marker.json", "thing", names) as folder:
            (folder / "part").write_text("new")
            assert (out / "part").read_text() == "former"
            if moment == "in the block":
                raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write()
    assert (out / "part").read_text() == "former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("renames", [0, 1])
def test_what_a_killed_process_left_is_cleared_away_or_put_back(tmp_path, renames):
    write = f"""
import os
from pathlib import Path
from cafe.data.folders import new_folder
def fill(text, kill):
    with new_folder("out", "marker.json", "thing", ["marker.json", "part"]) as folder:
        (folder / "marker.json").write_text('{{"format": "thing"}}')
        (folder / "part").write_text(text)
        if kill and {renames} == 0:
            os._exit(9)
        if kill:
            rename = Path.rename
            Path.rename = lambda self, to: rename(self, to) if to.suffix == ".old" else os._exit(9)
fill("former", False)
fill("new", True)
"""
    assert subprocess.run([sys.executable, "-c", write], cwd=tmp_path).returncode == 9
    left = {".out.tmp", "out"} if renames == 0 else {".out.tmp", ".out.old"}
    assert {entry.name for entry in tmp_path.iterdir()} == left
    with new_folder(tmp_path / "out", "marker.json", "thing", ["marker.json", "part"]) as folder:
        assert (tmp_path / "out" / "part").read_text() == "former"
        assert list(folder.iterdir()) == []
        (folder / "part").write_text("newest")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "part").read_text() == "newest"


def test_two_processes_do_not_write_one_folder(tmp_path):
    with new_folder(tmp_path / "out", "marker.json", "thing", []) as folder:
        (folder / "part").write_text("first")
        with (
            pytest.raises(BlockingIOError, match=r"another process writes .*out: wait"),
            new_folder(tmp_path / "out", "marker.json", "thing", []),
        ):
            pass
        assert (folder / "part").read_text() == "first"
    assert (tmp_path / "out" / "part").read_text() == "first"


def test_a_new_folder_replaces_the_former_one_whole(tmp_path):
    for text, names in (("former", ["marker.json", "part", "more"]), ("new", ["marker.json", "part"])):
        with new_folder(tmp_path / "out", "marker.json", "thing", ["marker.json", "part", "more"]) as folder:
            for name in names:
                (folder / name).write_text('{"format": "thing"}' if name == "marker.json" else text)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["marker.json", "part"]
    assert (tmp_path / "out" / "part").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_large_datasets_are_worked_on_in_blocks(monkeypatch):
    """Blocks of a few interactions give what one block gives, with rows that are empty and longer than a block."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 1, 3, 7, 30], 40)
    sequences = Sequences(
        np.concatenate([[0], np.cumsum(lengths)]), rng.integers(20, size=lengths.sum()).astype(np.int32)
    )
    ids = [pl.Series(range(count)) for count in (40, 20, 1)]
    dataset = Dataset(sequences, np.zeros(20, np.int32), *ids)
    whole = [
        dataset.sorted_histories(),
        dataset.train(),
        dataset.holdout("test").histories,
        sequences.take([5, 2, 5], 4),
    ]
    for row, items in enumerate(sequences):
        assert whole[0][row].tolist() == sorted(set(items.tolist()))
    monkeypatch.setattr("cafe.data.dataset.AT_ONCE", 6)
    blocks = [
        dataset.sorted_histories(),
        dataset.train(),
        dataset.holdout("test").histories,
        sequences.take([5, 2, 5], 4),
    ]
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_array_equal(one.items, other.items)
        assert one.items.dtype == other.items.dtype == np.int32
