"""The `cafe` command as a user meets it: every command on a small shop, wrong input, and Ctrl-C in the middle of training."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from rich.console import Console

from cafe import cli, plots
from cafe.cli import main
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.evaluate import evaluate
from cafe.evaluation import compare
from cafe.models.poprec import PopRec
from cafe.recommend import Recommender, _as_type
from cafe.tables import print_comparison, print_evaluation

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
        (
            ["recommend", "--run", "{shop}/cafe", "--users", "none.csv", "--out", "o.parquet"],
            1,
            "error: --users none.csv is no file: give a CSV or Parquet file with a column 'user'",
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


@pytest.fixture
def call(monkeypatch, capsys):
    """A command in this process: its standard output and error, its exit code checked."""

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["cafe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        done = capsys.readouterr()
        assert stop.value.code == code, done.err
        return done

    return run


def test_prepare_reads_raw_files(tmp_path, call):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
        "1,10,5,7,,0511,0\n1,11,6,8,2,0512,2\n1,10,5,7,,0513,1\n2,11,6,8,2,0511,2\n"
    )
    command = [
        "prepare",
        "--format",
        "tmall",
        "--interactions",
        tmp_path / "log.csv",
        "--out",
        tmp_path / "out",
        "--json",
    ]
    made = json.loads(call(*command, "--keep", "action_type=1,2", "--intent-col", "cat_id").out)
    assert made["stats"]["interactions"] == 3
    assert made["preparation"]["dropped"]["unkept_rows"] == 1
    assert Dataset.load(tmp_path / "out").intent_ids.to_list() == [5, 6]
    for wrong in ("action_type", "=2", "action_type="):
        assert "expected column=value[,value]" in call(*command, "--keep", wrong, code=1).err
    command[2] = "amazon"
    assert "expected a file that ends in .json" in call(*command, code=1).err


def test_brackets_are_text_and_not_markup(shop, tmp_path, call):
    bracket = {"i2": "[red]i2", "c3": "[/z]books"}
    for name, text in {"buys.csv": SHOP, "items.csv": ITEMS}.items():
        rows = [",".join(bracket.get(cell, cell) for cell in line.split(",")) for line in text.splitlines()]
        (tmp_path / name).write_text("\n".join(rows))
    data, run = tmp_path / "da[/ta]", tmp_path / "run[/a]"
    call("prepare", "--interactions", tmp_path / "buys.csv", "--items", tmp_path / "items.csv", "--out", data)
    call("train", "--data", data, "--out", run, "--epochs", 1, *SMALL)
    shown = call("recommend", "--run", run, "--history", "i4", "-k", 30).out
    assert "[red]i2" in shown
    assert "[/z]books" in shown
    assert "'[/nothing]'" in call("recommend", "--run", run, "--history", "[/nothing],i4", "--json").err
    assert "nope[/a]" in call("evaluate", "--run", "nope[/a]", code=1).err


def test_labels_are_text_in_tables(dataset, capsys):
    result = evaluate(PopRec(Config.make("poprec", "paper"), dataset), dataset, name="[/a]")
    print_evaluation(Console(), result, breakdown="mrr")
    print_comparison(Console(), compare(result, result))
    assert capsys.readouterr().out.count("[/a]") == 5


def test_users_and_dataset_paths_are_no_patterns(shop, tmp_path, call):
    folder = tmp_path / "a[b]*?"
    shutil.copytree(shop / "data", folder / "data")
    (folder / "users.csv").write_text("user\nu1\n")
    pl.DataFrame({"user": ["u9"]}).write_parquet(folder / "users.parquet")
    for name in ("users.csv", "users.parquet"):
        out = folder / "out.parquet"
        call("recommend", "--run", shop / "cafe", "--data", folder / "data", "--users", folder / name, "--out", out)
        assert out.exists()
        out.unlink()


def test_unwritable_run_keeps_the_report_and_a_sample_is_not_saved(shop, tmp_path, call):
    run = tmp_path / "run"
    shutil.copytree(shop / "sasrec", run)
    saved = run / "test-full.npz"
    saved.unlink(missing_ok=True)
    call("evaluate", "--run", run, "--protocol", "full", "--max-users", 5)
    assert not saved.exists()
    saved.mkdir()  # cannot be replaced by a file
    done = call("evaluate", "--run", run, "--protocol", "full", "--json")
    assert json.loads(done.out)["users"] == 40
    assert "not saved" in done.err


def test_compare_tells_two_runs_of_one_model_apart(shop, tmp_path, call):
    runs = [shop / "sasrec", tmp_path / "again"]
    shutil.copytree(*runs)
    full = ["compare", *runs, "--protocol", "full"]
    done = call(*full, "--plot", tmp_path / "missing" / "a.png", "--json", code=1)
    report = json.loads(done.out)["full"]
    assert "missing" in done.err
    assert [part["run"] for part in report["runs"]] == [str(run) for run in runs]
    assert [part["model"] for part in report["runs"]] == ["SASRec"] * 2
    assert report["gains"][0]["a"] == "SASRec best (again)"
    assert "(again)" in call(*full).out
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
        plots.plot_comparison({"full": report}, "mrr", tmp_path / "a.png")
    assert len({bar.get_y() for bar in figures[0].axes[0].patches}) == 2
    assert "unknown metric" in call(*full, "--metric", "ndgc@5", code=1).err
    assert "--plot draws" in call(*full, "--metric", "hr@7", "--plot", tmp_path / "a.png", code=1).err


def test_users_not_in_the_dataset_are_counted_and_skipped(shop, tmp_path, call):
    out = tmp_path / "out.parquet"
    for name, ids in {"some": ["u1", None, "nobody", "u9"], "none": []}.items():
        pl.DataFrame({"user": ids}, schema={"user": pl.String}).write_csv(tmp_path / f"{name}.csv")
    command = ["recommend", "--run", shop / "cafe", "--out", out, "-k", 3, "--json", "--users"]
    done = call(*command, tmp_path / "some.csv")
    assert json.loads(done.out) == {"out": str(out), "users": 2, "skipped": 2, "rows": 6}
    assert "2 users skipped" in done.err
    schema = pl.read_parquet(out).schema
    assert call(*command, tmp_path / "none.csv").err == ""
    assert pl.read_parquet(out).shape == (0, 5)
    assert pl.read_parquet(out).schema == schema


@pytest.mark.parametrize("text", ["1_0", "010", "+10", " 10", "-0", "\u0661\u0660", "9" * 5000, "", None])
def test_only_canonical_digits_are_a_number(text):
    ids = pl.Series([10, -3])
    assert _as_type(text, ids) is None
    assert [_as_type(value, ids) for value in ("10", "-3", "0", 10)] == [10, -3, 0, 10]


@pytest.mark.parametrize("histories", ["text", ["i20", "i21"], [20, 21]])
def test_a_flat_history_is_refused(dataset, histories):
    recommender = Recommender(PopRec(Config.make("poprec", "paper"), dataset), dataset)
    with pytest.raises(ValueError, match="expected a list of histories"):
        recommender.recommend(histories)


def test_too_many_threads_and_no_memory_are_one_line(call, monkeypatch):
    assert "1024" in call("train", "--out", "run", "--threads", 100_000, code=2).err

    def allocate(**_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9"
        )

    monkeypatch.setattr(cli, "app", allocate)
    assert call(code=1).err == "error: out of memory (can't allocate memory: 9)\n"


def test_printed_lines_are_not_broken(call, tmp_path):
    path = tmp_path / ("long " * 20)  # the width of a pipe is 80
    shown = call("simulate", "--out", path).out
    assert str(path) in shown
    assert shown.count("\n") == 1


def test_without_the_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import cafe.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'typer: pip install "cafe-kernels[cli]"' in done.stderr
    assert "python -m cafe.doctor" not in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert done.stderr.endswith("; without it: python -m cafe.doctor\n")
