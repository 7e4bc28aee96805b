"""The examples run, on simulated data."""

import gzip
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cafe.data.simulate import Shop, draw
from cafe_kernels import DistanceMaskedAttention

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = runpy.run_path(str(EXAMPLES / "drop_in.py"))
MAIN = EXAMPLE["main"]
SIZES = {"epochs": 4, "batch-size": 16, "dim": 16, "heads": 1, "layers": 1, "length": 8, "dropout": 0, "lr": 0.01}


def test_drop_in(tmp_path, capsys, monkeypatch):
    user, item, _ = draw(Shop(interactions=4000, items=400, intents=20, users=500), seed=0)
    with gzip.open(tmp_path / "interactions.csv.gz", "wt") as file:
        print("user,item,timestamp", file=file)
        for time, (u, i) in enumerate(zip(user, item, strict=True)):
            print(f"u{u},i{i},{time}", file=file)
    built, train = {}, EXAMPLE["train"]

    def spy(model, *rest):
        built.setdefault(id(model), model)
        train(model, *rest)

    monkeypatch.setitem(MAIN.__globals__, "train", spy)
    MAIN([str(tmp_path), *(f"--{name}={value}" for name, value in SIZES.items())])
    printed = capsys.readouterr().out
    pattern = r"^(\S+) +validation NDCG@10 (\d\.\d{4})  HR@10 (\d\.\d{4})  \(epoch \d\)  \d+\.\d\d s an epoch$"
    found = {name: (float(ndcg), float(hits)) for name, ndcg, hits in re.findall(pattern, printed, re.MULTILINE)}
    assert list(found) == ["nn.MultiheadAttention", "DistanceMaskedAttention"], printed
    by_chance = 10 / 400
    assert all(ndcg < hits and hits > 2 * by_chance for ndcg, hits in found.values()), printed
    plain, masked = (model.attention[0] for model in built.values())
    assert type(plain) is nn.MultiheadAttention
    assert isinstance(masked, DistanceMaskedAttention)
    assert masked.distance_weight.any()  # it began at zero
    assert masked.theta_curves().abs().max() > 0.01


def test_drop_in_names_the_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        MAIN([str(tmp_path)])
    assert f"no interactions.csv.gz in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_own_loop(tmp_path, capsys, suffix):
    user, item, _ = draw(Shop(interactions=4000, items=400, intents=20, users=500), seed=0)
    file = tmp_path / f"buys{suffix}"
    with gzip.open(file, "wt") if suffix.endswith(".gz") else file.open("w") as opened:
        print("user,item,timestamp", file=opened)
        for time, (u, i) in reversed(
            list(enumerate(zip(user, item, strict=True)))
        ):  # sorted by time, whatever the rows' order
            print(f"u{u},i{i},{time}", file=opened)
    sizes = {"epochs": 4, "batch-size": 16, "dim": 16, "length": 8, "negatives": 64, "lr": 0.01, "dropout": 0.0}
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]([str(file), *(f"--{k}={v}" for k, v in sizes.items())])
    printed = capsys.readouterr().out
    hits = [float(hit) for hit in re.findall(r"^epoch \d  loss \d+\.\d{3}  HR@10 (\d\.\d{4})$", printed, re.MULTILINE)]
    assert len(hits) == 4, printed
    last = np.append(user[1:] != user[:-1], True)
    popular = np.argsort(-np.bincount(item[~last], minlength=400))[:30]
    assert max(hits) > 2 * np.isin(item[last], popular[:10]).mean()
    assert max(hits) > np.isin(item[last], popular).mean()  # three times as many popular items, seen ones included
    *_, recommended = printed.splitlines()
    first = {f"i{i}" for i in item[user == user[-1]][:-1]}  # of the user whom the file names first
    found = recommended.removeprefix("for the first user: ").split(", ")
    assert len(set(found)) == 10
    assert not first & set(found)


def test_own_loop_names_the_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]([str(tmp_path / "no.csv")])
    assert "no.csv: no such file" in capsys.readouterr().err


def test_own_loop_reads_dates_and_names_an_empty_file(tmp_path, capsys):
    loop, file = runpy.run_path(str(EXAMPLES / "own_loop.py")), tmp_path / "buys.csv"
    file.write_text("user,item,timestamp\na,z,2024-01-02\na,y,2024-01-01T10:00:00Z\na,x,2024-01-01 09:00:00\n")
    ids, (history,) = loop["read"](file)
    assert [ids[item] for item in history] == ["x", "y", "z"]
    for text in ("", "user,item,timestamp\n"):
        file.write_text(text)
        with pytest.raises(SystemExit):
            loop["main"]([str(file)])
        assert "buys.csv: no user has three interactions" in capsys.readouterr().err


@pytest.mark.slow
def test_walkthrough(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WALKTHROUGH_FOLDER", str(tmp_path))
    monkeypatch.setenv("WALKTHROUGH_QUICK", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = runpy.run_path(str(EXAMPLES / "walkthrough.py"))
    assert {path.name for path in tmp_path.glob("*.png")} == {
        path.name for path in (EXAMPLES.parent / "docs/walkthrough").iterdir()
    }
    assert all(len(curve) == 1 for curve in found["curves"].values())
    assert found["axes"].get_legend_handles_labels()[1] == list(found["SYSTEMS"])  # the last figure's
    assert len(found["answer"].items) == 5
    assert not set(found["answer"].items) & set(found["history"])
    assert "'interactions': 24000" in capsys.readouterr().out
