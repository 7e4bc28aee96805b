"""Files to datasets: every format gives the same, against a plain-Python reference, and wrong files get one clear line."""

import gzip
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.data.dataset import Dataset
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
