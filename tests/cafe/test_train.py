"""Training end to end on a tiny shop: it learns, resumes bit for bit, refuses what it cannot use."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from cafe.batches import Batches
from cafe.checkpoint import load_checkpoint, save_checkpoint
from cafe.config import Config
from cafe.data.dataset import Sequences
from cafe.data.folders import seal
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.recommend import Recommender
from cafe.runs import load_run
from cafe.train import Interrupted, Optimizers, fit, make_optimizers, train_step

TINY = {"dim": 16, "max_len": 8, "batch_size": 16, "epochs": 3}


def weights(run):
    return load_checkpoint(run / "last.safetensors")[0]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dataset.save(folder / "data")
    fit(
        Config.make("cafe", "best", **TINY | {"epochs": 20}, dropout=0.1),
        dataset,
        folder / "cafe",
        data=folder / "data",
    )
    return folder


def test_learns_what_is_there(run):
    model, dataset = load_run(run / "cafe")
    cafe = evaluate(model, dataset, "test", "full").mean("ndcg@10")
    fit(Config.make("poprec"), dataset, run / "poprec", data=run / "data")
    popular = evaluate(load_run(run / "poprec")[0], dataset, "test", "full").mean("ndcg@10")
    assert cafe > 2 * popular
    lines = [json.loads(line) for line in (run / "cafe" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert (run / "cafe" / "curve.png").stat().st_size > 5000
    assert (run / "cafe" / "theta.png").stat().st_size > 5000
    assert not (run / "poprec" / "theta.png").exists()


class DenseAdam(torch.optim.AdamW):
    """What RowSparseAdam stands for: every step moves every row."""

    def catch_up(self, table, rows):
        pass

    def flush(self):
        pass

    def step(self):
        for table in self.param_groups[0]["params"]:
            table.grad = table.grad.to_dense()
        return super().step()


@pytest.mark.parametrize(("model", "preset"), [("cafe", "paper"), ("cafe", "best"), ("sasrec", "paper")])
def test_the_item_table_trains_as_with_dense_adam(dataset, tmp_path, monkeypatch, model, preset):
    config = Config.make(model, preset, **TINY, weight_decay=0.01)
    fit(config, dataset, tmp_path / "ours")

    def dense(net):
        options = {"lr": config.lr, "weight_decay": config.weight_decay}
        return Optimizers(DenseAdam(net.tables(), **options), make_optimizers(net).others)

    monkeypatch.setattr("cafe.train.make_optimizers", dense)
    fit(config, dataset, tmp_path / "dense")
    ours, expected = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ours", "dense")
    )
    assert ours == pytest.approx(expected, rel=1e-5)
    for file in ("best", "last"):
        ours, expected = (load_checkpoint(tmp_path / name / f"{file}.safetensors")[0] for name in ("ours", "dense"))
        name = "item_embedding" if file == "best" else "model.item_embedding"
        # Where a gradient is all rounding, Adam makes whole steps (1e-3) of it; a row left behind lacks several of them.
        assert (ours[name] - expected[name]).abs().mean() < 1e-5


@pytest.mark.parametrize(("model", "preset"), [("cafe", "paper"), ("cafe", "best"), ("sasrec", "paper")])
def test_resume_is_bit_identical(dataset, tmp_path, model, preset):
    config = Config.make(model, preset, **TINY)
    fit(config, dataset, tmp_path / "whole")

    def stop_at(step):
        def progress(event):
            if event["step"] == step and "tokens" in event:
                os.kill(os.getpid(), signal.SIGINT)

        return progress

    with pytest.raises(Interrupted, match="cafe train --resume"):
        fit(config, dataset, tmp_path / "cut", progress=stop_at(3))
    with pytest.raises(Interrupted):
        fit(config, dataset, tmp_path / "cut", resume=True, progress=stop_at(9))
    fit(config, dataset, tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_refuses_what_it_cannot_continue(dataset, other_dataset, tmp_path):
    config = Config.make("sasrec", **TINY | {"epochs": 1})
    fit(config, dataset, tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume"):
        fit(config, dataset, tmp_path / "run")
    with pytest.raises(ValueError, match="another configuration"):
        fit(Config.make("sasrec", **TINY | {"epochs": 2}), dataset, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="another configuration or dataset"):
        fit(config, other_dataset, tmp_path / "run", resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        fit(config, dataset, tmp_path / "new", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        fit(config, dataset, tmp_path / "other")


def test_a_loss_that_is_not_finite_stops(dataset, tmp_path):
    with pytest.raises(ValueError, match="the loss became"):
        fit(Config.make("sasrec", **TINY, lr=1e30), dataset, tmp_path / "run")
    assert threading.active_count() < 20


def test_a_step_with_a_bad_loss_changes_nothing(dataset, monkeypatch):
    config = Config.make("cafe", "best", **TINY)
    net, batches = build(config, dataset), Batches(config, dataset)
    optimizers = make_optimizers(net)
    train_step(net, optimizers, batches(batches.order(0)[:8], 0))
    optimizers.tables.flush()  # so that the next step has nothing to make up for
    before = {name: x.clone() for name, x in net.state_dict().items()}
    right = net.loss
    for factor in (math.nan, math.inf):
        monkeypatch.setattr(net, "loss", lambda batch, factor=factor: factor * right(batch))
        with pytest.raises(ValueError, match=r"the loss became .* at step 1"):
            train_step(net, optimizers, batches(batches.order(0)[:8], 1))
        assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
        assert int(optimizers.tables.state[net.item_embedding]["step"]) == 1


def test_checkpoints_are_refused_by_name_when_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"a": torch.arange(1000.0), "b": torch.ones((), dtype=torch.int64)}, {"step": 7})
    tensors, state = load_checkpoint(path)
    assert state == {"step": 7}
    assert torch.equal(tensors["a"], torch.arange(1000.0))
    content = path.read_bytes()
    rng, outcomes = np.random.default_rng(0), []
    for position in [*rng.integers(8, len(content), 60), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded, state = load_checkpoint(path)
        except ValueError as error:
            outcomes.append(str(error))
        else:  # a flipped bit in the header's blanks changes nothing
            outcomes.append("")
            assert state == {"step": 7}
            assert torch.equal(loaded["a"], torch.arange(1000.0))
    assert all("x.safetensors is damaged" in outcome for outcome in outcomes if outcome)
    assert sum(map(bool, outcomes)) > 50
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            load_checkpoint(path)


def test_a_full_disk_keeps_the_former_checkpoint(tmp_path):
    code = f"""
import resource, torch
from pathlib import Path
from cafe.checkpoint import save_checkpoint
path = Path({str(tmp_path)!r}) / "x.safetensors"
save_checkpoint(path, {{"a": torch.zeros(10)}}, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save_checkpoint(path, {{"a": torch.zeros(100_000)}}, {{}})
except OSError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    assert len(load_checkpoint(tmp_path / "x.safetensors")[0]["a"]) == 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_recommend(run):
    recommender = Recommender.load(run / "cafe")
    dataset = recommender.dataset
    history = dataset.item_ids[dataset.sequences[0]].to_list()
    answer, unread = recommender.recommend([history, []], k=5)
    assert len(answer.items) == 5
    assert not set(answer.items) & set(history)
    assert answer.scores == sorted(answer.scores, reverse=True)
    assert answer.intents == [f"c{int(item[1:]) // 10}" for item in answer.items]
    assert not answer.popular
    assert unread.popular
    counts = np.bincount(dataset.sequences.items, minlength=dataset.num_items)
    assert unread.items[0] == f"i{counts.argmax()}"
    with pytest.warns(UserWarning, match="1 unknown item ids skipped, the first is 'nothing'"):
        assert recommender.recommend([[*history, "nothing"]], k=5)[0].items == answer.items
    everything = recommender.recommend([dataset.item_ids.to_list()], k=5)[0]
    assert everything.items == []
    assert len(recommender.recommend([history], k=1000)[0].items) == dataset.num_items - len(set(history))
    assert recommender.history_of("u0") == history
    with pytest.raises(ValueError, match="'u9999' is not in the dataset"):
        recommender.history_of("u9999")


def test_a_run_of_another_version_or_dataset_is_refused(run, other_dataset, tmp_path):
    meta = json.loads((run / "cafe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_run(tmp_path)
    other_dataset.save(tmp_path / "data")
    with pytest.raises(ValueError, match="another dataset"):
        load_run(run / "cafe", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="is not a run"):
        load_run(tmp_path / "data")


def test_ctrl_c_at_any_step_loses_nothing(dataset, tmp_path):
    """Also at the last step of an epoch, whose validation must not be lost, and of the run, which must not go on."""
    config = Config.make("sasrec", "paper", **TINY | {"epochs": 2, "batch_size": 60})
    fit(config, dataset, tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for step in range(1, log[-1]["step"] + 1):
        out = tmp_path / str(step)

        def stop(event, step=step):
            if event["step"] == step and "tokens" in event:
                os.kill(os.getpid(), signal.SIGINT)

        try:
            fit(config, dataset, out, progress=stop)
        except Interrupted:
            fit(config, dataset, out, resume=True)
        again = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [(x["step"], x["loss"], x["valid"]) for x in again] == [(x["step"], x["loss"], x["valid"]) for x in log]
        for name in ("best.safetensors", "last.safetensors"):
            whole, cut = (load_checkpoint(folder / name) for folder in (tmp_path / "whole", out))
            assert all(torch.equal(whole[0][key], cut[0][key]) for key in whole[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["config"].update(depth=3), "of another release"),
        (lambda meta: meta["config"].update(dim=32), "does not fit"),
        (lambda meta: meta["config"].update(score_scale="sqrt_head_dim"), "config.json was altered"),
        (lambda meta: meta.pop("data"), None),
        (lambda meta: meta.update(fingerprint="0"), "another dataset"),
        (lambda meta: meta.update(config=[]), "of another release"),
    ],
)
def test_an_altered_config_is_refused_by_name(dataset, tmp_path, change, message):
    dataset.save(tmp_path / "data")
    fit(Config.make("sasrec", **TINY | {"epochs": 1}), dataset, tmp_path / "run", data=tmp_path / "data")
    meta = json.loads((tmp_path / "run" / "config.json").read_text())
    change(meta)
    (tmp_path / "run" / "config.json").write_text(json.dumps(meta))
    with pytest.raises(
        ValueError, match=r"config\.json is damaged or was altered \(its checksum differs\): restore it"
    ):
        load_run(tmp_path / "run")
    if message is None:
        return
    del meta["checksum"]
    (tmp_path / "run" / "config.json").write_bytes(seal(meta))  # as if the run were another one's
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "run")


def test_early_stopping_keeps_the_best(dataset, tmp_path, monkeypatch):
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    monkeypatch.setattr("cafe.train.validate", lambda *_: {"ndcg@10": next(scores)})
    fit(Config.make("sasrec", **TINY | {"epochs": 5, "patience": 2}), dataset, tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1]["epoch"] == 1


def test_a_dataset_that_cannot_be_trained_on_leaves_nothing(dataset, tmp_path):
    every = dataset.num_users
    short = Sequences(np.arange(every + 1) * 2, dataset.sequences.items[: every * 2])  # two interactions a user
    useless = replace(dataset, sequences=short)
    for model in ("sasrec", "poprec"):
        with pytest.raises(ValueError, match="nobody to validate on"):
            fit(Config.make(model, **TINY), useless, tmp_path / "run")
    three = Sequences(np.arange(every + 1) * 3, dataset.sequences.items[: every * 3])  # one of them to train on
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(Config.make("sasrec", **TINY), replace(useless, sequences=three), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_it_saved_anything_is_begun_again(dataset, tmp_path):
    with pytest.raises(ValueError, match="the loss became"):
        fit(Config.make("sasrec", **TINY, lr=1e30), dataset, tmp_path / "run")
    config = Config.make("sasrec", **TINY | {"epochs": 1})
    fit(config, dataset, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["lr"] == config.lr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a cafe-run: restore it"):
        fit(config, dataset, tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_ctrl_c_after_the_last_epoch_finishes_the_run_and_a_second_says_how_to_go_on(dataset, tmp_path, monkeypatch):
    config = Config.make("cafe", "best", **TINY | {"epochs": 1})
    dataset.save(tmp_path / "data")

    def press(times):
        def plot(out):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

        return plot

    monkeypatch.setattr("cafe.train.plot_curve", press(1))
    fit(config, dataset, tmp_path / "once", data=tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_run(tmp_path / "once")
    monkeypatch.setattr("cafe.train.plot_curve", press(2))
    with pytest.raises(Interrupted, match="cafe train --resume --out"):
        fit(config, dataset, tmp_path / "twice", data=tmp_path / "data")
    with pytest.warns(UserWarning, match=r"not finished.*cafe train --resume --out"):  # not calibrated
        load_run(tmp_path / "twice")


def test_loading_a_run_that_was_interrupted_warns(dataset, tmp_path):
    dataset.save(tmp_path / "data")

    def stop(event):
        if event["step"] == 9 and "tokens" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(Config.make("sasrec", **TINY), dataset, tmp_path / "run", data=tmp_path / "data", progress=stop)
    with pytest.warns(UserWarning, match="not finished"):
        load_run(tmp_path / "run")


def test_a_resume_refuses_an_altered_config_and_the_checkpoint_of_another_run(dataset, tmp_path):
    config, other = (Config.make("sasrec", **TINY | {"epochs": 1}, seed=seed) for seed in (0, 1))
    fit(config, dataset, tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "config.json").read_text())
    del meta["checksum"]
    (tmp_path / "run" / "config.json").write_bytes(seal(meta | {"config": meta["config"] | {"seed": 1}}))
    with pytest.raises(ValueError, match=r"last\.safetensors does not fit config\.json: config\.json was altered"):
        fit(other, dataset, tmp_path / "run", resume=True)
    (tmp_path / "run" / "config.json").write_bytes(seal(meta))
    fit(config, dataset, tmp_path / "run", resume=True)
    save_checkpoint(tmp_path / "run" / "last.safetensors", {"model.a": torch.zeros(1)}, {"step": 1})
    with pytest.raises(ValueError, match=r"last\.safetensors does not fit"):
        fit(config, dataset, tmp_path / "run", resume=True)


def test_one_process_at_a_time_trains_in_a_folder(dataset, tmp_path):
    config, refused = Config.make("sasrec", **TINY | {"epochs": 1}), []

    def again(event):
        if event["step"] == 1:
            for resume in (False, True):
                with pytest.raises(BlockingIOError, match="another process trains in"):
                    fit(config, dataset, tmp_path / "run", resume=resume)
            refused.append(event)

    fit(config, dataset, tmp_path / "run", progress=again)
    assert refused
    fit(config, dataset, tmp_path / "run", resume=True)  # the lock is free again


def test_a_resume_without_a_checkpoint_begins_a_new_log(dataset, tmp_path):
    config = Config.make("sasrec", **TINY | {"epochs": 2})
    fit(config, dataset, tmp_path / "run")
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "last.safetensors").unlink()
    fit(config, dataset, tmp_path / "run", resume=True)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())
