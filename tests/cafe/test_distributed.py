"""Training on several gloo processes: as one process with the same batches, whatever is killed."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cafe.batches import Batches
from cafe.checkpoint import load_checkpoint
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import seal
from cafe.evaluate import evaluate
from cafe.models import blocks
from cafe.recommend import Recommender
from cafe.runs import load_run
from cafe.shards import export
from cafe.train import fit
from cafe_kernels import TopKIndex
from tests import ranks

needs_torchrec = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torchrec", "fbgemm_gpu")),
    reason="torchrec and fbgemm-gpu-cpu are not installed: docs/scale.md says how",
)
TINY = {"dim": 16, "max_len": 8, "batch_size": 16, "epochs": 3, "dropout": 0.0}
CONFIG = Config.make("cafe", "best", **TINY, weight_decay=0.01)
PAPER = Config.make("cafe", "paper", **TINY, weight_decay=0.01)


@pytest.fixture(scope="module")
def data(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "data"
    dataset.save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two ranks that nothing stopped, and its losses."""
    out = tmp_path_factory.mktemp("whole") / "run"
    losses, stopped = ranks.run(2, ranks.fit, PAPER, data, out)
    assert stopped == ""
    return out, losses


def alone(config, data, out, **options):
    """The losses of one process."""
    losses = []
    fit(
        config,
        Dataset.load(data),
        out,
        data=data,
        progress=lambda e: losses.append(e.get("loss")) if "tokens" in e else 0,
    )
    return losses


def lines(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"} for x in (run / "metrics.jsonl").open()]


def best(run):
    return load_checkpoint(run / "best.safetensors")


def shards(run, name="last"):
    """All tensors of a sharded checkpoint, put together."""
    index = json.loads((run / f"{name}.json").read_text())
    tensors = load_checkpoint(run / "shards" / index["common"])[0]
    parts = [load_checkpoint(run / "shards" / file)[0] for file, *_ in index["shards"]]
    return tensors | {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


CASES = [
    ("sasrec", "paper", {}, 2),
    ("sasrec", "best", {"compose_items": True}, 2),
    ("cafe", "paper", {"negatives": 3}, 4),
    ("cafe", "best", {"weight_decay": 0.01}, 2),
    ("cafe", "best", {"valid_protocol": "full", "patience": 1}, 4),
]


@needs_torchrec
@pytest.mark.parametrize(("model", "preset", "options", "count"), CASES)
def test_has_the_losses_the_weights_and_the_ranks_of_one_process(data, tmp_path, model, preset, options, count):
    config = Config.make(model, preset, **TINY | options)
    losses = alone(config, data, tmp_path / "one")
    together, stopped = ranks.run(count, ranks.fit, config, data, tmp_path / "many")
    assert stopped == ""
    np.testing.assert_allclose(together, losses, rtol=2e-6)
    (one, state), (many, other) = best(tmp_path / "one"), best(tmp_path / "many")
    assert_close(one, many, rtol=1e-3, atol=2e-5)  # Adam divides by gradients that are next to nothing, too
    assert state == pytest.approx(other) if "calibrated" not in state else state["calibrated"] == other["calibrated"]
    for line, same in zip(lines(tmp_path / "one"), lines(tmp_path / "many"), strict=True):
        assert line["valid"] == pytest.approx(same["valid"])
        assert line["loss"] == pytest.approx(same["loss"], rel=2e-6)


@needs_torchrec
def test_the_last_batch_may_have_fewer_sequences_than_ranks(data, tmp_path):
    """Of 120 users 1 is left for the last step: three ranks count for nothing in it."""
    users = len(Batches(CONFIG, Dataset.load(data)).rows)
    config = Config.make("cafe", "paper", **TINY | {"batch_size": users - 1, "epochs": 2})
    losses = alone(config, data, tmp_path / "one")
    together, _ = ranks.run(4, ranks.fit, config, data, tmp_path / "many")
    assert len(together) == 4
    np.testing.assert_allclose(together, losses, rtol=2e-6)


@needs_torchrec
def test_one_rank_has_the_numbers_of_cafe_train_with_dropout(data, tmp_path):
    config = Config.make("cafe", "best", **TINY | {"dropout": 0.3, "epochs": 2})
    losses = alone(config, data, tmp_path / "one")
    together, _ = ranks.run(1, ranks.fit, config, data, tmp_path / "many")
    np.testing.assert_allclose(together, losses, rtol=1e-6)
    assert ranks.run(2, ranks.fit, config, data, tmp_path / "two")[0] != pytest.approx(losses, rel=1e-4)


@needs_torchrec
def test_replicas_stay_the_same_bit_for_bit(data):
    config = Config.make("cafe", "best", **TINY | {"dropout": 0.3})
    assert ranks.run(2, ranks.replicas_differ, config, data, 5) == []


@needs_torchrec
def test_rows_and_gradients_find_their_ranks():
    asked = [np.array(ids) for ids in ([10, 0, 5], [0, 7, 10, 3], [], [2])]
    for count in (1, 2, 4):
        fetched, grad = ranks.run(count, ranks.raw_rows, 11, 3, [ids.astype(np.int64) for ids in asked])
        expected = torch.zeros(11, 3)
        for rank, ids in enumerate(asked[:count]):
            expected[ids] += rank + 1
        assert fetched
        assert torch.equal(grad, expected)


@needs_torchrec
def test_a_checkpoint_loads_with_any_number_of_ranks(data, whole, tmp_path):
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        some, stopped = ranks.run(2, ranks.fit, PAPER, data, out, 10)
        assert "saved. Go on with: torchrun --nproc-per-node 2 -m cafe.distributed --resume" in stopped
        assert len(some) == 11  # the signal is heard in the next step
        rest, stopped = ranks.run(count, ranks.resumed, PAPER, data, out)
        assert stopped == ""
        np.testing.assert_allclose(some + rest, whole[1], rtol=2e-6)
        tolerance = {"rtol": 0, "atol": 0} if count == 2 else {"rtol": 1e-3, "atol": 2e-5}
        assert_close(best(out)[0], best(whole[0])[0], **tolerance)
        assert_close(shards(out), shards(whole[0]), **tolerance)
        assert lines(out)[0] == lines(whole[0])[0]


@needs_torchrec
def test_a_save_that_fails_leaves_the_former_checkpoint(data, whole, tmp_path):
    out = tmp_path / "cut"
    # Barriers: 3 at the start, then 2 for each save: of the best and the last one at the end of an epoch.
    some, stopped = ranks.run(2, ranks.fit, PAPER, data, out, 0, 3 + 4 + 1)
    assert stopped == "pulled the plug"
    index = json.loads((out / "last.json").read_text())
    assert index["step"] == 7
    assert len(list((out / "shards").glob("best-14-*"))) == 3  # written, and not yet named
    rest, stopped = ranks.run(2, ranks.resumed, PAPER, data, out)
    assert stopped == ""
    assert some[:7] + rest == whole[1]
    assert_close(shards(out), shards(whole[0]), rtol=0, atol=0)
    named = {
        f for name in ("last", "best") for f in re.findall(r"[\w-]+\.safetensors", (out / f"{name}.json").read_text())
    }
    assert {file.name for file in (out / "shards").iterdir()} == named


@needs_torchrec
def test_saving_the_same_step_on_other_ranks_leaves_the_former_files_until_it_is_whole(data, tmp_path):
    tmp_path.joinpath("run").mkdir()
    ranks.run(2, ranks.save_best, PAPER, data, tmp_path / "run", 1.0, False)
    for count in (3, 2):
        assert ranks.run(count, ranks.save_best, PAPER, data, tmp_path / "run", 2.0, True) == "cut"
        table = ranks.run(2, ranks.load_best, PAPER, data, tmp_path / "run")
        assert torch.equal(table, torch.ones_like(table))
    ranks.run(3, ranks.save_best, PAPER, data, tmp_path / "run", 2.0, False)
    table = ranks.run(1, ranks.load_best, PAPER, data, tmp_path / "run")
    assert torch.equal(table, torch.full_like(table, 2.0))
    assert len(list((tmp_path / "run" / "shards").iterdir())) == 4  # what was cut is gone


@needs_torchrec
def test_ranks_that_differ_do_not_train(data, tmp_path):
    other = Config.make("cafe", "paper", **TINY, weight_decay=0.02)
    out = tmp_path / "run"
    found = ranks.run(3, ranks.differ, PAPER, data, out, other, out)
    assert found[0] == []
    assert "ranks differ: option weight_decay is 0.01 on rank 0 and 0.02 on rank 2" in found[1]
    assert not out.exists()
    found = ranks.run(2, ranks.differ, PAPER, data, out, PAPER, tmp_path / "elsewhere")
    assert found[0] == []
    assert f"rank 1 does not see what rank 0 writes to {out}" in found[1]


@pytest.fixture
def saved(whole, tmp_path):
    """A copy of the run of two ranks."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


def reseal(path, change):
    index = json.loads(path.read_text())
    del index["checksum"]
    change(index)
    path.write_bytes(seal(index))


@needs_torchrec
@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(common=5),
        lambda index: index.update(common="../../other/shards/best-1-aa-all.safetensors"),
        lambda index: index["shards"][0].__setitem__(0, "../best-14-aa-rows-0.safetensors"),
        lambda index: index.pop("shards"),
        lambda index: index.update(shards=[]),
        lambda index: index.update(shards=[[]]),
        lambda index: index["shards"].pop(),
        lambda index: index["shards"].reverse(),
        lambda index: index["shards"][1].__setitem__(1, 0),
        lambda index: index["shards"][0].__setitem__(1, -18),
        lambda index: index["shards"][0].__setitem__(2, 30.0),
        lambda index: index.update(rows=1.5),
        lambda index: index.update(rows=61),
        lambda index: index.update(step=None),
    ],
)
def test_an_altered_index_is_refused(saved, change):
    reseal(saved / "best.json", change)
    with pytest.raises(ValueError, match=r"best\.json names no checkpoint's files and rows"):
        export(saved)


@needs_torchrec
def test_a_part_in_another_ones_place_is_refused(saved):
    (first, *_), (second, *_) = json.loads((saved / "best.json").read_text())["shards"]
    shutil.copy(saved / "shards" / first, saved / "shards" / second)
    with pytest.raises(ValueError, match="is of another run, step or part of the table than its place"):
        export(saved)


@needs_torchrec
def test_links_in_place_of_checkpoints_are_not_written_through(saved, data, tmp_path):
    victim = tmp_path / "victim"
    shutil.copytree(saved / "shards", victim)
    (victim / "thesis.tex").write_text("precious")
    before = sorted(victim.iterdir())
    shutil.rmtree(saved / "shards")
    (saved / "shards").symlink_to(victim)
    with pytest.raises(ValueError, match="shards is not a folder, but a link"):
        export(saved)
    assert "shards is not a folder, but a link" in ranks.run(1, ranks.resumed, PAPER, data, saved)[1]
    assert sorted(victim.iterdir()) == before


@needs_torchrec
def test_saving_removes_no_files_of_others(saved, data):
    others = [saved / "shards" / name for name in ("notes.txt", "last-1.safetensors", "folder")]
    for path in others[:2]:
        path.write_text("mine")
    others[2].mkdir()
    left = saved / "shards" / "best-1-00-all.safetensors"
    left.write_text("of a process that was killed")
    ranks.run(1, ranks.save_best, PAPER, data, saved, 1.0, False)
    assert all(path.exists() for path in others)
    assert not left.exists()


@needs_torchrec
def test_an_unfinished_run_says_how_to_go_on(data, tmp_path):
    out = tmp_path / "run"
    ranks.run(2, ranks.fit, PAPER, data, out, 10)
    export(out)
    with pytest.warns(UserWarning, match="Go on with: torchrun --nproc-per-node N -m cafe.distributed --resume --out"):
        load_run(out)
    next((out / "shards").glob("best-*-rows-0.safetensors")).unlink()
    losses, stopped = ranks.run(2, ranks.resumed, PAPER, data, out)
    assert losses == []  # and not after all epochs
    assert "rows-0.safetensors is missing" in stopped


@needs_torchrec
def test_what_is_ranked_and_recommended_is_that_of_the_exported_run(data, tmp_path):
    out = tmp_path / "run"
    ranks.run(2, ranks.fit, CONFIG, data, out)
    model, dataset = load_run(out)
    for protocol in ("aligned", "full"):
        plain = evaluate(model, dataset, "test", protocol)
        for count in (2, 3):
            greater, equal = ranks.run(count, ranks.evaluated, CONFIG, data, out, protocol)
            assert greater.keys() == plain.greater.keys()
            for score in greater:
                assert (greater[score] == plain.greater[score]).all()
                assert (equal[score] == plain.equal[score]).all()
    assert len(Recommender.load(out).recommend([["i1", "i2"]], k=5)[0].items) == 5


def top_k_cases():
    torch.manual_seed(0)
    for items, users, k, join, with_intents in [
        (50, 7, 5, "identity", False),
        (50, 7, 40, "log_sigmoid", True),
        (50, 7, 5, "identity", True),
        (5, 3, 5, "log_sigmoid", False),
        (500, 20, 10, "log_sigmoid", True),
    ]:
        keys = torch.randint(-2, 3, (items, 4)).float() / 2  # many ties
        intent, user = torch.arange(items) % 3, torch.randint(-2, 3, (users, 4)).float()
        scores = torch.randint(-2, 3, (users, 3)).float() if with_intents else None
        seen = [torch.randperm(items)[: torch.randint(items // 2, ())] for _ in range(users)]
        exclude = torch.tensor([0, *np.cumsum([len(x) for x in seen])]), torch.cat(seen)
        yield keys, intent, (user, scores, join, exclude), k, torch.randint(items, (users,))


@needs_torchrec
@pytest.mark.parametrize("count", [1, 3])
def test_the_merged_top_k_and_ranks_are_those_of_one_index(count):
    cases = list(top_k_cases())
    for (keys, intent, query, k, answers), found in zip(cases, ranks.run(count, ranks.many_top_k, cases), strict=True):
        user, scores, join, exclude = query
        index = TopKIndex(keys, intent)
        one = index.search(user, k, scores, join=join, exclude=exclude)
        assert torch.equal(found[0], one.items)
        assert torch.equal(found[1], one.scores)
        assert torch.equal(found[2], index.count_above(user, answers, scores, join=join, exclude=exclude))


def pid_of_rank(parent, rank):
    """The process that torchrun started as this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if started_by == parent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (OSError, IndexError):
            continue  # it has ended
    raise AssertionError(f"rank {rank} is not running")


@needs_torchrec
def test_a_killed_rank_is_started_again_or_stops_the_job_which_resumes_with_nothing_lost(data, tmp_path):
    options = TINY | {"epochs": 20, "patience": 20}
    config = Config.make("cafe", "paper", **options)
    settings = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=1",
            "-m",
        ),
        *("cafe.distributed", "--data", data, "--out", tmp_path / "run", "--preset", "paper", *settings),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    last, saved = tmp_path / "run" / "last.json", 0
    for _ in range(2):  # after the first kill torchrun starts the ranks again, and they go on
        step, deadline = 0, time.monotonic() + 200
        while step <= saved and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.02)
            step = json.loads(last.read_text())["step"] if last.exists() else 0
        assert step > saved, job.communicate()[0]
        os.kill(pid_of_rank(job.pid, 1), signal.SIGKILL)
        saved = json.loads(last.read_text())["step"]
    text = " ".join(job.communicate(timeout=60)[0].split())
    assert job.returncode != 0
    saved = json.loads(last.read_text())["step"]
    assert "error: rank 0 of 2 lost another" in text
    assert f"go on from step {saved} with: torchrun --nproc-per-node 2 -m cafe.distributed --resume --out" in text
    whole, _ = ranks.run(2, ranks.fit, config, data, tmp_path / "whole")
    assert 0 < saved < len(whole)
    rest, stopped = ranks.run(2, ranks.resumed, config, data, tmp_path / "run")
    assert stopped == ""
    assert rest == whole[saved:]
    assert_close(shards(tmp_path / "run"), shards(tmp_path / "whole"), rtol=0, atol=0)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@needs_torchrec
@pytest.mark.parametrize(
    ("config", "count", "options", "message"),
    [
        (Config.make("fdsa", **TINY), 1, {}, "trains sasrec and cafe with sampled losses"),
        (Config.make("sasrec", **TINY, loss="full"), 1, {}, "trains sasrec and cafe with sampled losses"),
        (CONFIG, 1, {"table": "host"}, "leave --table out"),
        (CONFIG, 1, {"resume": True}, "holds no run to resume"),
        (Config.make("cafe", "paper", **TINY, init_std=1e30), 2, {}, "the loss became nan at step 0"),
    ],
)
def test_says_what_it_cannot_do(data, tmp_path, config, count, options, message):
    assert message in ranks.run(count, ranks.fit_with, config, data, tmp_path / "run", options)[1]


@needs_torchrec
def test_a_run_is_gone_on_with_by_what_began_it(data, tmp_path):
    ranks.run(1, ranks.fit, CONFIG, data, tmp_path / "many", 8)
    with pytest.raises(ValueError, match=r"holds a run of `torchrun --nproc-per-node N -m cafe\.distributed`"):
        fit(CONFIG, Dataset.load(data), tmp_path / "many", resume=True)
    fit(CONFIG, Dataset.load(data), tmp_path / "one")
    assert "holds a run of `cafe train`" in ranks.run(1, ranks.resumed, CONFIG, data, tmp_path / "one")[1]


def test_wants_torchrun():
    done = subprocess.run(
        [sys.executable, "-m", "cafe.distributed", "--out", "x"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cafe.distributed runs under torchrun")


def test_parts_make_the_whole_batch(dataset):
    from cafe.distributed import make_part

    for config in (CONFIG, Config.make("cafe", "paper", **TINY | {"negatives": 3, "batch_size": 5})):
        batches = Batches(config, dataset)
        rows = batches.order(0)[: config.batch_size]
        whole = batches(rows, 7)
        for count in (1, 3, 8):
            parts = [make_part(batches, rows, 7, rank, count) for rank in range(count)]
            counting = [part for part in parts if part.share]
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert {part.tokens for part in parts} == {len(whole.positives)}
            assert len({part.batch.step for part in parts}) == count  # their dropout differs
            for part in counting:
                assert part.share == len(part.batch.positives) / len(whole.positives)
            for name in ("items", "positives", "negatives"):
                joined = [part.batch.rows[getattr(part.batch, name)] for part in counting]
                expected = getattr(whole, name)
                if expected.dim() == 1 and name == "negatives":  # shared by the batch
                    assert all(torch.equal(one, expected) for one in joined)
                else:
                    assert torch.equal(torch.cat(joined), expected)
            for name in ("ignore", "positive_log_q", "intent_negatives"):
                if getattr(whole, name) is not None:
                    assert torch.equal(
                        torch.cat([getattr(part.batch, name) for part in counting]), getattr(whole, name)
                    )


@pytest.mark.parametrize("rows", [1, 15, 40, 63, 64, 80, 129])
def test_a_part_of_a_table_begins_as_in_the_whole(monkeypatch, rows):
    monkeypatch.setattr(blocks, "ROWS", 64)
    for dim in (1, 5, 16):
        config = Config.make("sasrec", dim=dim)
        torch.manual_seed(3)
        whole, after = blocks.embedding_table(rows, config), torch.rand(3)
        for keep in (range(rows), range(0, rows // 2), range(rows // 3, rows)):
            torch.manual_seed(3)
            assert torch.equal(blocks.embedding_table(rows, config, keep), whole[keep.start : keep.stop])
            assert torch.equal(torch.rand(3), after)
