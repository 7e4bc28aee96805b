"""Experiments: files that are read or refused, runs that are trained once, tables that say what they show."""

import json
import os
from dataclasses import replace

import pytest

from cafe import experiment as module
from cafe.config import Config
from cafe.evaluation import Evaluation
from cafe.experiment import read_experiment, run_experiment, slug
from cafe.models import MODELS
from cafe.report import write_report
from cafe.tables import experiment_markdown

from .conftest import shop

FILE = """
baseline = "Plain one"
seeds = 2
protocols = ["aligned", "full"]

[common]
dim = 8
epochs = 1
max_len = 5

[systems.Popular]
model = "poprec"

[systems."Plain one"]
model = "sasrec"

[systems.CAFE]
model = "cafe"
preset = "best"
negatives = 8
"""


def test_the_tables_of_the_paper_come_with_the_package():
    table2, table3 = read_experiment("table2"), read_experiment("table3")
    assert sorted(config.model for config in table2.systems.values()) == sorted(MODELS)
    assert {config.preset for config in table2.systems.values()} == {"paper"}
    parts = [(config.model, config.distance_mask, config.join != "item") for config in table3.systems.values()]
    assert parts[:2] == [("sasrec", True, True), ("fdsa", True, True)]
    assert parts[2:] == [("cafe", False, False), ("cafe", True, False), ("cafe", False, True), ("cafe", True, True)]
    assert table3.systems["+(1)(2)(3)(4) CAFE"] == Config.make("cafe", "paper", dim=64)


def test_an_experiment_trains_what_is_missing_and_ranks_it(dataset, tmp_path, monkeypatch):
    (tmp_path / "one.toml").write_text(FILE)
    dataset.save(tmp_path / "data")
    experiment = read_experiment(tmp_path / "one.toml")
    begun = []

    def progress(name, seed):
        begun.append((name, seed))
        return lambda event: None

    results = run_experiment(experiment, tmp_path / "data", tmp_path / "runs", progress=progress)
    assert begun == [(name, seed) for seed in (0, 1) for name in ("Popular", "Plain one", "CAFE")]
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir() if entry.is_dir()) == [
        "cafe-0", "cafe-1", "plain-one-0", "plain-one-1", "popular-0", "popular-1"
    ]  # fmt: skip
    assert {protocol: list(systems) for protocol, systems in results.items()} == {
        protocol: ["Popular", "Plain one", "CAFE"] for protocol in ("aligned", "full")
    }
    first, second = results["full"]["CAFE"]
    assert first.mean("mrr") != second.mean("mrr")
    # What is there is neither trained nor ranked again.
    monkeypatch.setattr("cafe.train.train_step", None)
    stored = Evaluation.load(tmp_path / "runs" / "cafe-0" / "test-full.npz")
    ranked, rank = [], module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *args, **kw: ranked.append(kw["name"]) or rank(*args, **kw))
    again = run_experiment(experiment, tmp_path / "data", tmp_path / "runs")
    assert "CAFE" not in ranked
    assert again["full"]["CAFE"][0].mean("mrr") == stored.mean("mrr") == first.mean("mrr")
    text = experiment_markdown(results, experiment.baseline)
    mean = (first.mean("ndcg@5") + second.mean("ndcg@5")) / 2
    row = next(line for line in text.splitlines()[text.splitlines().index("### full") :] if line.startswith("| CAFE |"))
    assert f"| {mean:.4f} ±" in row
    assert row.count("x [") == 1
    assert "| CAFE, item score |" in text
    assert "| Plain one |" in text
    assert f"{len(first.users):,} users, test, against the whole catalog." in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[systems.CAFE]", "[systems.CAFE", "cannot be read as TOML"),
        ('model = "cafe"', 'model = "cafe2"', "systems.CAFE: model='cafe2': expected one of 'poprec'"),
        ('model = "cafe"', "wings = 2", "systems.CAFE: .*model"),
        ("negatives = 8", "wings = 8", "systems.CAFE: no such option: wings"),
        ("seeds = 2", "seeds = 0", "seeds=0: expected a whole number from 1 on"),
        ('"full"]', '"half"]', "expected a list of some of aligned, full, authors"),
        ('["aligned", "full"]', "[]", r"protocols=\[\]: expected a list"),
        ('["aligned", "full"]', "3", "protocols=3: expected a list"),
        ('["aligned", "full"]', '"full"', "protocols='full': expected a list"),
        ('["aligned", "full"]', '[["full"]]', "expected a list"),
        ("dim = 8", "seed = 8", "expected a model and no seed"),
        ('baseline = "Plain one"', 'baseline = ["Plain one"]', "is not one of the systems"),
        ("[common]", "[common]\nx = 1\n[systems.D]", "systems.D: expected a model"),
        ('baseline = "Plain one"', "common = 3", "TOML|expected a part"),
        ('baseline = "Plain one"', 'baseline = "Other"', "baseline 'Other' is not one of the systems"),
        ("[systems.CAFE]", '[systems."plain ONE"]', "would share a run folder"),
        ("[common]", "[usual]", "unknown usual"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, old, new, message):
    assert old in FILE
    (tmp_path / "one.toml").write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_experiment(tmp_path / "one.toml")


def test_no_such_experiment(tmp_path):
    with pytest.raises(FileNotFoundError, match="come with the package: figure4, table2, table3"):
        read_experiment("table9")
    (tmp_path / "empty.toml").write_text("seeds = 1\n")
    with pytest.raises(ValueError, match="no system in it"):
        read_experiment(tmp_path / "empty.toml")


def test_a_changed_experiment_does_not_take_the_runs_of_another(dataset, tmp_path):
    (tmp_path / "one.toml").write_text(FILE)
    dataset.save(tmp_path / "data")
    run_experiment(read_experiment(tmp_path / "one.toml"), tmp_path / "data", tmp_path / "runs")
    (tmp_path / "one.toml").write_text(FILE.replace("negatives = 8", "negatives = 9"))
    with pytest.raises(ValueError, match="started with another configuration"):
        run_experiment(read_experiment(tmp_path / "one.toml"), tmp_path / "data", tmp_path / "runs")


def test_a_system_has_the_last_word_and_a_protocol_counts_once(tmp_path):
    (tmp_path / "one.toml").write_text(FILE.replace('["aligned", "full"]', '["full", "full"]') + "dim = 4\n")
    experiment = read_experiment(tmp_path / "one.toml")
    assert [config.dim for config in experiment.systems.values()] == [8, 8, 4]
    assert experiment.protocols == ["full"]


def test_two_experiments_in_one_folder_and_a_ranking_that_is_stale(dataset, tmp_path):
    (tmp_path / "one.toml").write_text(FILE.replace("seeds = 2", "seeds = 1"))
    dataset.save(tmp_path / "data")
    run_experiment(read_experiment(tmp_path / "one.toml"), tmp_path / "data", tmp_path / "runs")
    kept = tmp_path / "runs" / "cafe-0" / "test-full.npz"
    before = Evaluation.load(kept)
    replace(before, seed=7, popularity="train").save(kept)  # of other candidates: ranked again
    other = FILE.replace("seeds = 2", "seeds = 1").replace("Popular]", '"a|b\\n"]')
    (tmp_path / "two.toml").write_text(other)
    results = run_experiment(read_experiment(tmp_path / "two.toml"), tmp_path / "data", tmp_path / "runs")
    assert results["full"]["CAFE"][0].seed == 0
    names = json.loads((tmp_path / "runs" / "experiment.json").read_text())["systems"]
    assert set(names.values()) == {"Popular", "Plain one", "CAFE", "a|b\n"}
    rows = [line for line in experiment_markdown(results, "Plain one").splitlines() if line.startswith("| a\\|b |")]
    assert len(rows) == 6  # the ranking and two breakdowns of two protocols
    os.utime(kept, ns=(0, 0))  # older than the model: ranked again
    run_experiment(read_experiment(tmp_path / "one.toml"), tmp_path / "data", tmp_path / "runs")
    assert kept.stat().st_mtime_ns > 0


def test_without_three_intents_the_authors_pairing_is_left_out(tmp_path):
    shop(intents=2).save(tmp_path / "data")
    (tmp_path / "one.toml").write_text(FILE.replace('["aligned", "full"]', '["authors", "full"]').replace("= 2", "= 1"))
    results = run_experiment(read_experiment(tmp_path / "one.toml"), tmp_path / "data", tmp_path / "runs")
    assert list(results) == ["full"]
    notes = write_report([tmp_path / "runs"], tmp_path / "report")
    assert any(note.startswith("authors is left out") for note in notes)


def test_slugs():
    assert [slug(name) for name in ("SSE-PT", "+(1)(2)", "../x", "…")] == ["sse-pt", "+-1-2", "x", "system"]
