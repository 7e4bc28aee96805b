"""The tools of the benchmark suite: quality against time, the results' format, the report, the comparison, the fitted growth."""

import copy
import gzip
import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import common, growth, regressions, report
from benchmarks.peers import end_to_end, env
from benchmarks.peers.contestant import Data, ten_best
from cafe.data.dataset import Dataset
from cafe.evaluate import evaluate
from cafe.models import Scores

ITEMS = 40


@pytest.fixture
def folder(tmp_path):
    """60 users' raw files; some take an item again."""
    rng = np.random.default_rng(0)
    source = tmp_path / "tiny"
    source.mkdir()
    with gzip.open(source / "interactions.csv.gz", "wt") as file:
        print("user,item,timestamp", file=file)
        for user in range(60):
            for time in range(rng.integers(2, 9)):  # with 2, a user is trained on and never ranked
                print(f"u{user},i{rng.integers(ITEMS)},{time}", file=file)
    with gzip.open(source / "items.csv.gz", "wt") as file:
        print("item,intent", file=file)
        for item in range(ITEMS):
            print(f"i{item},c{item % 5}", file=file)
    return source


class Fixed:
    """Scores that depend on the newest item alone."""

    config = type("config", (), {"max_len": 50})

    def __init__(self, num_items):
        self.table = torch.randn(num_items, num_items, generator=torch.Generator().manual_seed(0))

    def score(self, items, cu_seqlens, candidates=None, candidate_intents=None):
        return Scores(self.table[items[cu_seqlens[1:].long() - 1]], None)

    def join(self, item_logits, *rest, **more):
        return item_logits


def test_everybody_is_ranked_as_evaluate_ranks(folder, tmp_path):
    path, answers = end_to_end.prepare_data(str(folder), tmp_path)
    dataset, data = Dataset.load(tmp_path / "dataset"), Data(path)
    model = Fixed(dataset.num_items)
    top = ten_best(data, lambda users: model.table[[data.history(user)[-1] for user in users]])
    expected = evaluate(model, dataset, "valid", "full").mean("ndcg@10")
    assert end_to_end.ndcg_at_10(top, answers) == pytest.approx(expected)
    assert expected > 0.05
    assert len(data) > len(data.users) == len(answers)
    train = dataset.train()
    assert all((data.history(row) == train[row]).all() for row in range(len(train)))


def test_a_contestant_trains_by_turns(folder, tmp_path):
    out = tmp_path / "out" / "curves.json"
    name = f"{end_to_end.OURS}SASRec paper, BCE"
    end_to_end.run([name], str(folder), epochs=4, patience=9, budget=1e9, threads=1, seed=0, out=out)
    record = common.read(out)
    curve = record["curves"][name]
    assert [line["epoch"] for line in curve] == [2, 4]
    assert 0 < curve[0]["cpu_seconds"] < curve[1]["cpu_seconds"]
    assert curve[0]["peak_bytes"] > 1e7
    assert all(0 <= line["ndcg@10"] <= 1 for line in curve)
    assert record["libraries"][name]["torch"] == torch.__version__


def curve(*points):
    return [
        {"epoch": i + 1, "cpu_seconds": float(s), "wall_seconds": 2.0 * s, "ndcg@10": n, "peak_bytes": 5e8, "peak_beyond_start_bytes": 1e8}
        for i, (s, n) in enumerate(points)
    ]  # fmt: skip


CURVES = {
    "RecTools, BCE": curve((5, 0.01), (10, 0.02)),
    "RecTools, softmax": curve((20, 0.01), (40, 0.04), (60, 0.03)),
    "cafe: slow": curve((30, 0.05)),
    "cafe: fast": curve((1, 0.01), (2, 0.04), (3, 0.06)),
    "cafe: never": curve((1, 0.01)),
}


def test_seconds_to_a_value():
    assert end_to_end.seconds_to(CURVES["cafe: fast"], 0.04) == 2
    assert end_to_end.seconds_to(CURVES["cafe: fast"], 0.02, "wall_seconds") == 4
    assert end_to_end.seconds_to(CURVES["cafe: never"], 0.04) is None
    assert end_to_end.final(CURVES["RecTools, softmax"]) == 0.04


def test_ratios_to_each_of_rectools_contestants():
    ratios = end_to_end.times_shorter(CURVES)
    assert ratios == {
        "cafe: slow": {"RecTools, BCE": 10 / 30, "RecTools, softmax": 40 / 30},
        "cafe: fast": {"RecTools, BCE": 5, "RecTools, softmax": 20},
        "cafe: never": {"RecTools, BCE": 0, "RecTools, softmax": 0},
    }
    assert end_to_end.least_favourable(CURVES) == (5, "cafe: fast", "RecTools, BCE")
    for curves in (
        {},
        {"cafe: x": curve((1, 0.1))},
        {**CURVES, "RecTools, BCE": [], "RecTools, softmax": curve((1, np.nan))},
    ):
        assert end_to_end.least_favourable(curves) is None
    target = {target.what: target for target in report.TARGETS}["the same, beauty"]
    assert "| **5x** | >= 10x | **no** |" in target.row({"end_to_end_beauty": {"curves": CURVES}})
    assert "| not measured |" in target.row({"end_to_end_beauty-sparse": {"curves": CURVES}})
    lines = end_to_end.summary({"curves": CURVES, "patience": 1}).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:7]] == ["2+", "3", "1+", "3+", "1+"]
    assert lines[10:] == [
        "| times shorter | RecTools, BCE+ | RecTools, softmax |",
        "|---|--:|--:|",
        "| cafe: slow | 0.3 | 1.3 |",
        "| cafe: fast | 5.0 | 20.0 |",
        "| cafe: never | never | never |",
        "",
        "+: ended by the budget, not for want of a better value: RecTools, BCE.",
        "",
        "The least favourable: 5.0 times, cafe: fast against RecTools, BCE.",
    ]


def test_results_say_their_version(tmp_path):
    path = common.write("x", {"cases": {}}, tmp_path)
    record = common.read(path)
    assert record["version"] == common.VERSION
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["machine"]["load_average"]) == 3
    path.write_text(json.dumps({**record, "version": 1}))
    with pytest.raises(ValueError, match=r"x\.json has results of version 1, expected 2"):
        common.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        common.read(path)


def test_compare_has_quartiles():
    steady, after, spread = common.compare({"a": lambda x: x, "b": lambda x: sum(range(2000))}, lambda i: i, rounds=6)
    assert steady.keys() == after.keys() == spread.keys() == {"a", "b"}
    assert all(low <= steady[name] <= high for name, (low, high) in spread.items())


def timing(noise=0.02, **seconds):
    return {
        "median_seconds": seconds,
        "quartiles": {name: [s * (1 - noise), s * (1 + noise)] for name, s in seconds.items()},
    }


def record(noise=0.02, load=None, **cases):
    machine = {"load_average": load and [load] * 3, "cores": 2}
    timings = {case: timing(noise, **s) for case, s in cases.items()}
    return {"version": common.VERSION, "machine": machine, "ours": ["ours"], "cases": timings}


OLD = record(a={"ours": 1.0, "peer": 4.0}, b={"ours, twice": 2.0, "peer": 4.0, "other": 3.0})


@pytest.mark.parametrize(
    ("new", "slower", "faster"),
    [
        (OLD, [], []),
        (record(a={"ours": 1.3, "peer": 4.0}, b={"ours, twice": 1.0, "peer": 4.0, "other": 3.0}), ["a"], ["b"]),
        # a machine that is twice as slow is no regression of ours, and hides none
        (record(a={"ours": 2.0, "peer": 8.0}, b={"ours, twice": 5.2, "peer": 8.0, "other": 6.0}), ["b"], []),
        (record(a={"ours": 1.03, "peer": 4.0}), [], []),  # less than --least
        (record(0.3, a={"ours": 1.3, "peer": 4.0}), [], []),  # within the noise
    ],
)
def test_regressions_are_beyond_the_noise(new, slower, faster):
    found = regressions.changes(OLD, new)
    assert [change.case.split(" / ")[1] for change in found if change.beyond(0.05)] == slower
    assert [change.case.split(" / ")[1] for change in found if change.gain(0.05)] == faster
    assert {change.contestant for change in found} <= {"ours", "ours, twice"}


def test_regressions_of_files_without_quartiles_or_peers():
    def steps(slow):
        return {"ours": [""], "sizes": {"10": {"median_seconds": 1.0}, "20": {"median_seconds": 1.1 * slow}}}

    assert not any(change.beyond(0.05) for change in regressions.changes(steps(1.0), steps(1.1)))  # 10% each is assumed
    assert [change.beyond(0.05) for change in regressions.changes(steps(1.0), steps(1.3))] == [False, True]
    steady = {"median_seconds": {"steady": {"ours": 1.0, "peer": 1.0}, "after_another": {"ours": 9.0, "peer": 1.0}}}
    assert [case for _, case in regressions.timings(steady)] == [
        {"median_seconds": {"ours": 1.0, "peer": 1.0}, "quartiles": {}}
    ]
    apart = {
        "V=1": {"steady": timing(ours=1.0), "after_another": timing(ours=9.0)},
        "sizes": {"median_seconds": {"x": [1.0]}},
    }
    assert {case: found["median_seconds"] for case, found in regressions.timings(apart)} == {
        "V=1 / steady": {"ours": 1.0},
        "sizes": {},
    }


@pytest.fixture
def status(monkeypatch):
    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["regressions", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            regressions.main()
        return stopped.value.code

    return status


@pytest.mark.parametrize(
    "case",
    [
        timing(ours=float("nan"), peer=1.0),
        timing(ours=1.0, peer=-1.0),
        timing(ours=0, peer=1.0),
        timing(float("nan"), ours=1.0, peer=1.0),
        {"median_seconds": float("inf")},
        {"median_seconds": {"ours": "1", "peer": 1.0}},
        {"median_seconds": {"ours": 1.0}, "quartiles": {"ours": [1.0]}},
        {"median_seconds": None},
    ],
)
def test_regressions_refuse_what_is_no_timing(case, tmp_path, status, capsys):
    for name, content in (("old", OLD), ("new", {**OLD, "cases": {"a": case}})):
        (tmp_path / name).write_text(json.dumps(content))
    assert status(tmp_path / "old", tmp_path / "new") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'new'}: ")


@pytest.mark.parametrize(
    "damage", [{"ours": None}, {"machine": 3}, {"versions": [1]}, {"cases": {"a": {"median_seconds": {"steady": 1}}}}]
)
def test_regressions_of_a_damaged_file_are_none(damage, tmp_path, status, capsys):
    for name, content in (("old", OLD), ("new", OLD | damage)):
        (tmp_path / name).write_text(json.dumps(content))
    assert status(tmp_path / "old", tmp_path / "new") == 2
    assert "one is damaged" in capsys.readouterr().err


def test_regressions_say_what_they_do_not_compare(tmp_path, status, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    on = {"threads": 1, "versions": {"torch": "2.13"}, "machine": {"cpu": "A", "cores": 2, "load_average": None}}
    there = {"threads": 2, "versions": {"torch": "2.14"}}
    dropped = record(a={"ours": 3, "peer": 4, "new": 1}, c={"ours": 1})  # integers count
    del dropped["machine"]
    growing = {"version": common.VERSION, "lines": {}}
    files = {old / "x.json": OLD | on, new / "x.json": dropped | there, old / "y.json": OLD}
    for path, content in (files | {old / "growth.json": growing, new / "growth.json": growing}).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    assert status(old, new, "--least", 9) == 0
    printed = capsys.readouterr().out
    for line in (
        "growth has no timings of ours to compare",
        "x: not measured alike: cpu A -> None",
        "x: not measured alike: threads 1 -> 2",
        "x: not measured alike: torch 2.13 -> 2.14",
        f"only in {old / 'y.json'}",
        f"only in {new / 'x.json'}: cases / a: new",
        f"only in {old / 'x.json'}: cases / b: other; ours, twice; peer",
        f"only in {new / 'x.json'}: cases / c: ours",
    ):
        assert line + "\n" in printed
    assert printed.count("only in") == 4
    assert status(old, new, "--least", 9, "--strict") == 1
    assert status(old / "x.json", new / "x.json") == 1
    assert "SLOWER x: cases / a: ours: 1e+03 -> 3e+03 ms" in capsys.readouterr().out
    assert status(old, old, "--strict") == 0
    for least in ("nan", "-1", "inf"):
        assert status(old, new, f"--least={least}") == 2


def test_regressions_exit_status(tmp_path, status, capsys):
    slow = record(load=3.0, a={"ours": 1.3, "peer": 4.0})
    for name, content in (("old", OLD), ("new", slow), ("other", record(c={"ours": 1.0}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text(json.dumps(content))
    old, new, other = (tmp_path / name for name in ("old", "new", "other"))
    assert status(old / "x.json", old / "x.json") == 0
    assert "busy" not in capsys.readouterr().out
    assert status(old, new) == 1
    printed = capsys.readouterr().out
    assert "SLOWER x: cases / a: ours: 1e+03 -> 1.3e+03 ms, 1.30 x" in printed
    assert f"{new / 'x.json'} was measured on a busy machine (load average 3.0 on 2 cores)" in printed
    assert status(old, new, "--least", 0.5) == 0
    assert status(old, other) == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert status(old, new / "x.json") == 2
    assert "two files, or two folders" in capsys.readouterr().err


def test_report_marks_what_is_missed():
    def rows(value):
        results = {"training": {"ratio_to_padded": {"SASRec paper": value}}}
        return [row for row in report.targets(results).splitlines() if row.startswith("| training on Beauty")]

    assert rows(11.08)[0].endswith("| 11.1x | >= 10x | yes |")
    assert rows(9.99)[0].endswith("| **9.99x** | >= 10x | **no** |")
    assert report.targets({}).count("not measured") == len(report.TARGETS) - 4  # which are from documents
    assert report.cell(1.4, ("<=", 1.3)) == "**1.4**"
    assert report.cell(1.4, None) == "1.4"


def test_report_writes_between_its_markers():
    page = "before\n<!-- report: steps -->\nold\n<!-- end of report -->\nafter\n"
    sizes = {"10000": {"median_seconds": 0.25, "ratio_to_smallest": 1.0, "share_waiting": 0.01}}
    new = report.written(page, {"at_scale_steps": {"sizes": sizes}})
    assert new.startswith("before\n")
    assert new.endswith("<!-- end of report -->\nafter\n")
    assert "| 10,000 | 250 | 1.00 | 1.0% |" in new
    assert "old" not in new
    assert report.written(new, {"at_scale_steps": {"sizes": sizes}}) == new
    with pytest.raises(ValueError, match="a marker of 'stepz'"):
        report.written(page.replace("steps", "stepz"), {})
    with pytest.raises(ValueError, match="without its end"):
        report.written("<!-- report: steps -->\n" + page, {})


def parts(record):
    """Every dict and list in it."""
    if isinstance(record, dict | list):
        yield record
        for value in record.values() if isinstance(record, dict) else record:
            yield from parts(value)


def test_report_of_incomplete_files():
    """Whatever is missing is not measured, and what is there is as it was."""
    page = "".join(f"{report.BEGIN.format(name)}\n{report.END}\n" for name in report.SECTIONS)
    files, shown, rng = report.load(), report.written(page, report.load()), np.random.default_rng(0)
    assert "nan" not in shown
    for name in files:
        for i in range(12):
            results = {**files, name: copy.deepcopy(files[name])}
            among = list(parts(results[name]))
            part = among[0 if i < 4 else rng.integers(len(among))]
            keys = list(part) if isinstance(part, dict) else range(len(part))
            key = keys[rng.integers(len(keys))]
            if i % 4 == 0:
                del part[key]
            else:
                part[key] = (None, float("nan"), {})[i % 4 - 1]
            report.written(page, results)
    peers = copy.deepcopy(files)
    del peers["peers_search"]["ours"]
    peers["peers_sampler"]["ours"] = ["nobody"]
    del peers["peers_optimizers"]["cases"]["V=10000"]["median_seconds"]
    written = report.peers(peers)
    assert "| peers_search | V=100000 users=1 | TopKIndex | not measured |" in written
    assert "| peers_sampler | V=10000, draw | AliasSampler | not measured |" in written
    assert "| peers_optimizers | V=10000 |  | not measured |" in written
    assert "| x | not measured |" in report.files({"x": {}})
    assert report.end_to_end({"end_to_end_x": {}}) == "end_to_end_x: not measured"
    assert report.exponents({"growth": {"version": 2}}) == report.steps({}) == report.stages({}) == "not measured"
    assert "| cafe: x | not measured |" in end_to_end.summary({"curves": {"cafe: x": []}, "patience": 1})
    speed = {"training": {"ratio_to_padded": {"SASRec paper": float("nan")}}}
    assert report.targets(speed) == report.targets({})
    line = {"grows": "V", "contestants": {"x": {"sizes": [1, 2], "seconds": [1.0, np.nan], "exponent": np.nan}}}
    assert growth.table({"lines": {"x": line}}).endswith("| x | x | not measured |")


def test_report_reads_tables_of_documents():
    assert (
        report.largest("| a | b B |\n|---|--:|\n| x | 1.5 |\n| y | - |\n| z | |\n\n| c |\n|--:|\n| 7 |", "b B") == 1.5
    )


def test_the_page_is_as_its_results():
    page = report.README.read_text()
    assert report.written(page, report.load()) == page, "run: python -m benchmarks.report"
    assert all(report.BEGIN.format(name) in page for name in report.SECTIONS)


def test_growth_fits_the_exponent():
    sizes = [10, 100, 1000]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [2, 2, 2]) == pytest.approx(0, abs=1e-12)
    calls = {"a": lambda number: None, "b": lambda number: None}
    assert {name: len(taken) for name, taken in growth.measure(calls, lambda: 0.0).items()} == dict.fromkeys(
        calls, growth.ROUNDS
    )


@pytest.mark.parametrize(("load", "shown"), [(0.4, "-0.90 |"), (5.0, "measured on a busy machine |")])
def test_growth_over_threads_means_nothing_on_a_busy_machine(load, shown):
    line = {"grows": "threads", "contestants": {"x": {"sizes": [1, 2], "seconds": [1.0, 0.5], "exponent": -0.9}}}
    found = growth.table({"machine": {"load_average": [load] * 3, "cores": 2}, "lines": {"x, by threads": line}})
    assert found.splitlines()[-1].endswith(shown)


def test_environments_are_made_anew_when_a_pin_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setenv("CAFE_PEERS", str(tmp_path / "made"))
    monkeypatch.setattr(env, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(env, "NAMES", ["x"])
    monkeypatch.setattr(env.venv, "create", lambda where, **_: where.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(env.subprocess, "run", lambda command, check: made.append(command[-1].read_text()))
    for pins in ("a==1\n", "a==1\n", "a==2\n"):
        (tmp_path / "x.txt").write_text(pins)
        assert env.python_of("x") == tmp_path / "made" / "x" / "bin" / "python"
    assert made == ["a==1\n", "a==2\n"]
    with pytest.raises(ValueError, match="peer 'y': expected one of x"):
        env.python_of("y")


def test_peers_are_pinned():
    assert env.NAMES == ["fbgemm", "recbole", "rectools", "search"]
    for name in env.NAMES:
        lines = (env.REQUIREMENTS / f"{name}.txt").read_text().split()
        assert all("==" in line for line in lines)
        assert "torch==2.13.0" in lines
    used = {settings.get("environment", "rectools") for settings in end_to_end.CONTESTANTS.values()}
    assert used <= set(env.NAMES)
