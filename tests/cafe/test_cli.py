"""The `cafe` command as a user meets it: every command on a small shop, wrong input, and Ctrl-C in the middle of training."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

SHOP = "user,item,timestamp\n" + "".join(
    f"u{u},i{(u * 7 + t * t) % 30},{t}\n" for u in range(40) for t in range(3 + u % 6)
)
ITEMS = "item,intent\n" + "".join(f"i{i},c{i % 5}\n" for i in range(30))
SMALL = ["--dim", "8", "--batch-size", "8", "--threads", "1"]


def command(*arguments):
    return [sys.executable, "-m", "cafe.cli", *map(str, arguments)]


def cafe(*arguments, code=0):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A prepared dataset with two trained runs."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "buys.csv").write_text(SHOP)
    (folder / "items.csv").write_text(ITEMS)
    cafe("prepare", "--interactions", folder / "buys.csv", "--items", folder / "items.csv", "--out", folder / "data")
    for model in ("sasrec", "cafe"):
        cafe("train", "--data", folder / "data", "--model", model, "--out", folder / model, "--epochs", 2, *SMALL)
    return folder


def test_prepare_and_train_report_as_json(shop, tmp_path):
    made = json.loads(cafe("prepare", "--interactions", shop / "buys.csv", "--out", tmp_path / "data", "--json").stdout)
    assert made["stats"]["interactions"] == SHOP.count("\n") - 1
    trained = json.loads(
        cafe("train", "--data", shop / "data", "--out", tmp_path / "run", "--epochs", 1, "--json", *SMALL).stdout
    )
    assert trained["model"] == "cafe"
    assert trained["epochs"] == 1
    assert {"config.json", "curve.png", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("protocol", ["aligned", "full", "authors"])
def test_evaluate_has_the_promised_shape(shop, protocol):
    done = cafe("evaluate", "--run", shop / "cafe", "--protocol", protocol, "--json")
    result = json.loads(done.stdout)
    assert {"model", "preset", "protocol", "users", "metrics", "ci", "buckets"} <= result.keys()
    assert result["protocol"] == protocol
    assert result["users"] == 40
    low, high = result["ci"]["ndcg@5"]
    assert low <= result["metrics"]["ndcg@5"] <= high
    assert ("artefact" in done.stderr) == (protocol == "authors")


def test_compare_is_paired_and_draws(shop, tmp_path):
    report = json.loads(cafe("compare", shop / "sasrec", shop / "cafe", "--plot", tmp_path / "a.png", "--json").stdout)
    assert report.keys() == {"aligned", "full"}
    assert len(report["full"]["runs"]) == 2
    assert len(report["full"]["gains"]) == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_recommend_leaves_out_what_was_seen(shop):
    answer = json.loads(cafe("recommend", "--run", shop / "cafe", "--user", "u5", "-k", 5, "--json").stdout)
    assert len(answer["items"]) == 5
    assert not set(answer["items"]) & set(answer["history"])
    unknown = cafe("recommend", "--run", shop / "cafe", "--history", "i1,what", "--json")
    assert "what" in unknown.stderr
    assert not json.loads(unknown.stdout)["popular"]
    assert "most popular" in cafe("recommend", "--run", shop / "cafe", "--history", "what").stdout


def test_recommend_for_a_file_of_users(shop, tmp_path):
    (tmp_path / "users.csv").write_text("user\nu1\nu9\n")
    cafe(
        "recommend", "--run", shop / "cafe", "--users", tmp_path / "users.csv", "--out", tmp_path / "o.parquet", "-k", 3
    )
    table = pl.read_parquet(tmp_path / "o.parquet")
    assert table["user"].to_list() == ["u1"] * 3 + ["u9"] * 3
    assert table["rank"].to_list() == [1, 2, 3] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "--run", "nowhere"], 1, "nowhere"),
        (["train", "--data", "nowhere", "--out", "run"], 1, "nowhere"),
        (["train", "--data", "{shop}/data", "--out", "run", "--model", "gru"], 1, "gru"),
        (["train", "--data", "{shop}/data", "--out", "run", "--set", "alpha"], 1, "expected name=value"),
        (["train", "--data", "{shop}/data", "--out", "run", "--set", "beauty=1"], 1, "beauty"),
        (["train", "--data", "{shop}/data", "--out", "run", "--lr", "-1"], 1, "lr"),
        (["recommend", "--run", "{shop}/cafe"], 1, "exactly one"),
        (["recommend", "--run", "{shop}/cafe", "--user", "nobody"], 1, "nobody"),
        (
            ["recommend", "--run", "{shop}/cafe", "--users", "{shop}/items.csv", "--out", "o.parquet"],
            1,
            "no column 'user'",
        ),
        (["evaluate", "--run", "{shop}/cafe", "--protocol", "fair"], 1, "fair"),
        (["train", "--what"], 2, "--what"),
    ],
)
def test_mistakes_are_one_line(shop, tmp_path, arguments, code, message):
    arguments = [argument.format(shop=shop) for argument in arguments]
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def interrupted(*arguments, epochs):
    """Trains until so many epochs are logged, presses Ctrl-C, and returns what was then said and logged."""
    log = arguments[arguments.index("--out") + 1] / "metrics.jsonl"
    training = subprocess.Popen(command("train", *arguments), stderr=subprocess.PIPE, text=True)
    while training.poll() is None and not (log.exists() and log.read_text().count("\n") >= epochs):
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    _, stderr = training.communicate(timeout=60)
    assert training.returncode == 130, stderr
    return stderr, [json.loads(line)["epoch"] for line in log.read_text().splitlines()]


def test_ctrl_c_saves_and_says_how_to_go_on(shop, tmp_path):
    run = ["--data", shop / "data", "--out", tmp_path / "run"]
    endless = ["--epochs", 1_000_000, "--set", "patience=1000000", *SMALL]
    stderr, epochs = interrupted(*run, *endless, epochs=2)
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    _, more = interrupted(*run, "--resume", epochs=len(epochs) + 2)
    assert more == list(range(len(more)))  # went on where it was, no epoch twice


def test_resume_refuses_other_options(shop):
    stop = cafe("train", "--resume", "--out", shop / "cafe", "--set", "dim=99", code=1).stderr
    assert "dim is 8, not 99" in stop
    assert "sasrec" in cafe("train", "--resume", "--out", shop / "cafe", "--model", "sasrec", code=1).stderr


def test_truncated_parquet_gzip_is_one_line(shop, tmp_path):
    whole = io.BytesIO()
    pl.read_csv(io.StringIO(SHOP)).write_parquet(whole)
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress(whole.getvalue())[:-200])
    stop = cafe("prepare", "--interactions", tmp_path / "x.parquet.gz", "--out", tmp_path / "d", code=1).stderr
    assert "x.parquet.gz: cannot be read" in stop
    assert "Traceback" not in stop
