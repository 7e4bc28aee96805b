"""A run folder, a dataset or an experiment from somebody who wants to do harm: nothing is executed, and nothing outside is written."""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cafe
import cafe_kernels
from cafe.checkpoint import load_checkpoint, save_checkpoint
from cafe.cli import main
from cafe.config import Config
from cafe.data.dataset import FILES, Dataset
from cafe.data.folders import checksum, new_folder, read_sealed, seal, write_file
from cafe.data.prepare import prepare
from cafe.evaluation import Evaluation
from cafe.experiment import read_experiment, read_names, slug
from cafe.runs import load_run
from cafe.train import fit
from cafe_kernels import RowSparseAdam

CONFIG = Config.make("cafe", "best", dim=8, max_len=4, batch_size=32, epochs=1)


@pytest.fixture
def sent(dataset, tmp_path):
    """A dataset and a finished run as somebody sends them."""
    dataset.save(tmp_path / "data")
    fit(CONFIG, dataset, tmp_path / "run", data=tmp_path / "data")
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["cafe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


class Exploit:
    """Touches a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def seal_dataset(folder):
    """New checksums for its files."""
    meta = json.loads((folder / "meta.json").read_bytes())
    del meta["checksum"]
    meta["checksums"] = {name: checksum(folder / name) for name in FILES}
    (folder / "meta.json").write_bytes(seal(meta))


def test_nothing_is_unpickled(sent, monkeypatch):
    """Pickles, plain, by numpy and by torch, in place of each file that is read, with right checksums where they are outside of it."""
    touched = sent / "touched"
    exploit = Exploit(touched)
    pickle.loads(pickle.dumps(exploit))
    assert touched.exists()  # it would work
    touched.unlink()
    plain, array, whole = (sent / name for name in ("plain", "array.npy", "torch"))
    plain.write_bytes(pickle.dumps(exploit))
    np.save(array, np.array([exploit], object), allow_pickle=True)
    torch.save({"x": exploit}, whole)
    evaluation = sent / "run" / Evaluation.file_name("test", "full")
    names = [
        "run/config.json",
        "run/best.safetensors",
        "run/last.safetensors",
        *(f"data/{name}" for name in ("meta.json", *FILES)),
    ]
    for name in names:
        file = sent / name
        former, meta = file.read_bytes(), (sent / "data/meta.json").read_bytes()
        for content in (plain, array, whole):
            shutil.copy(content, file)
            if name.startswith("data/") and not name.endswith("json"):
                seal_dataset(sent / "data")
            assert command(monkeypatch, "train", "--resume", "--out", sent / "run") == 1
            (sent / "data/meta.json").write_bytes(meta)
            file.write_bytes(former)
    for content in (plain, array, whole):
        shutil.copy(content, evaluation)
        with pytest.raises(ValueError, match="cannot read"):
            Evaluation.load(evaluation)
    np.savez(evaluation.open("wb"), meta=np.array([exploit], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Evaluation.load(evaluation)
    assert not touched.exists()


def test_no_source_unpickles():
    """Whoever needs one of these has to think first, and then to change this test."""
    for package in (cafe, cafe_kernels):
        for file in Path(package.__file__).parent.rglob("*.py"):
            text = file.read_text()
            assert not re.search(
                r"\bimport pickle|\btorch\.load\b|\bjoblib\b|\bdill\b|(?<![\w.])(eval|exec)\(|shell=True", text
            ), file
            for call in re.findall(r"np\.load\(.*", text):
                assert "allow_pickle=False" in call, file


def snapshot(folder):
    return {entry: entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}


@pytest.mark.parametrize(
    "name",
    [".lock", ".config.json.tmp", ".best.safetensors.tmp", ".last.safetensors.tmp", ".metrics.jsonl.tmp", "metrics.jsonl", "curve.png",
     "best.safetensors", ".test-full.npz.tmp", "test-full.npz"],
)  # fmt: skip
def test_links_in_a_run_folder_are_not_written_through(sent, monkeypatch, name):
    """Where cafe writes, a link to a file of the victim's lies."""
    victim = sent / "home" / "victim"
    victim.parent.mkdir()
    run = sent / "run"
    victim.write_bytes((run / name).read_bytes() if (run / name).exists() else b"precious")
    before = snapshot(victim.parent)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    for arguments in (
        ("train", "--resume", "--out", run),
        ("evaluate", "--run", run, "--protocol", "full"),
    ):
        assert command(monkeypatch, *arguments) in (0, 1)
    assert snapshot(victim.parent) == before


def test_a_link_in_place_of_a_temporary_file_or_folder_is_replaced(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim / "file")
    write_file(tmp_path / "link", [b"new"])
    assert (tmp_path / "link").read_bytes() == b"new"
    (tmp_path / ".out.tmp").symlink_to(victim)
    with new_folder(tmp_path / "out", "marker", "kind", ["marker"]) as folder:
        (folder / "marker").write_text("x")
    assert (tmp_path / "out" / "marker").exists()
    (tmp_path / ".next.tmp").mkdir()
    (tmp_path / ".next.tmp" / "inside").symlink_to(victim)
    with new_folder(tmp_path / "next", "marker", "kind", ["marker"]) as folder:
        assert not any(folder.iterdir())
    assert (victim / "file").read_bytes() == b"precious"


def test_devices_and_pipes_are_not_waited_for(sent, monkeypatch):
    """/dev/zero never ends, and a pipe that nobody writes to never begins."""
    os.mkfifo(sent / "pipe")
    for target in (Path("/dev/zero"), sent / "pipe"):
        for name in (
            "run/config.json",
            "run/best.safetensors",
            "run/last.safetensors",
            "data/meta.json",
            "data/items.npy",
        ):
            former = (sent / name).read_bytes()
            (sent / name).unlink()
            (sent / name).symlink_to(target)
            assert command(monkeypatch, "train", "--resume", "--out", sent / "run") == 1, name
            (sent / name).unlink()
            (sent / name).write_bytes(former)
        kept = sent / "run" / Evaluation.file_name("test", "full")
        kept.symlink_to(target)
        with pytest.raises(ValueError, match="not a file"):
            Evaluation.load(kept)
        kept.unlink()
        (sent / "experiment.json").symlink_to(target)
        assert read_names(sent) == ({}, "")
        (sent / "experiment.json").unlink()


@pytest.mark.parametrize("data", ["/etc", "../..", "/dev/zero", "\0", "x" * 5000, 7, None, ["x"]])
def test_the_path_of_the_dataset_is_only_read(sent, monkeypatch, data):
    config = sent / "run/config.json"
    meta = json.loads(config.read_bytes())
    del meta["checksum"]
    config.write_bytes(seal(meta | {"data": data}))
    before = snapshot(sent / "data")
    assert command(monkeypatch, "evaluate", "--run", sent / "run") == 1
    assert snapshot(sent / "data") == before


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "/", "/etc/passwd", "a/../../b", "a\\..\\b", "\0", "", " ", "~", "$HOME", "a\nb"]
)
def test_run_folders_of_an_experiment_stay_inside(name, tmp_path):
    """Whatever a system is called, its folder is one name of letters, digits, _, + and -."""
    assert re.fullmatch(r"[\w+-]+", slug(name))
    assert slug(name) not in (".", "..")
    file = tmp_path / "x.toml"
    file.write_text(f"[systems.{json.dumps(name)}]\nmodel = 'sasrec'\n")
    assert list(read_experiment(file).systems) == [name]


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = 1e", "systems = 3", "\ud800"])
def test_toml_that_is_too_deep_or_wrong_is_refused(tmp_path, text):
    (tmp_path / "x.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"x\.toml: "):
        read_experiment(tmp_path / "x.toml")


def test_json_that_is_too_deep_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        read_sealed(tmp_path / "x.json", "thing", 1, "do this")
    (tmp_path / "experiment.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"experiment\.json is damaged"):
        read_names(tmp_path)


@pytest.mark.parametrize("cell", ["{1, 2}", "b'x'", "1j", "(1, {2})", "...", "{(1,): 2}"])
def test_literals_that_json_has_not_are_no_values(tmp_path, cell):
    (tmp_path / "r.json").write_text(f"{{'reviewerID': {cell}, 'asin': 'a', 'unixReviewTime': 1}}\n")
    with pytest.raises(ValueError, match=r"'reviewerID', row 1 of .*: no value"):
        prepare(tmp_path / "r.json", format="amazon")


def alter(array, value):
    changed = array.copy()
    changed[len(changed) // 2] = value
    return changed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("indptr", lambda x: alter(x, 10**9)),
        ("indptr", lambda x: x[:-1]),
        ("indptr", lambda x: x + 1),
        ("items", lambda x: alter(x, 10**6)),
        ("items", lambda x: alter(x, -1)),
        ("items", lambda x: x.astype(np.float32)),
        ("items", lambda x: x[None]),
        ("item_intent", lambda x: alter(x, 99)),
        ("item_intent", lambda x: x[:-1]),
    ],
)
def test_a_dataset_that_contradicts_itself_is_refused(sent, name, change):
    """With right checksums: its numbers would be read out of bounds."""
    file = sent / "data" / f"{name}.npy"
    np.save(file, change(np.load(file)))
    seal_dataset(sent / "data")
    with pytest.raises(ValueError, match=r"is damaged \("):
        Dataset.load(sent / "data")


@pytest.mark.parametrize(
    "change",
    [
        {"config": None}, {"config": {"dim": 2**40}}, {"fingerprint": None}, {"data": 7},
    ],
)  # fmt: skip
def test_a_sealed_configuration_of_another_kind_is_refused(sent, change):
    config = sent / "run/config.json"
    meta = json.loads(config.read_bytes())
    del meta["checksum"]
    for altered in (meta | change, {key: value for key, value in meta.items() if key not in change}):
        config.write_bytes(seal(altered))
        with pytest.raises(ValueError, match=r"config\.json is of another release"):
            load_run(sent / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -(10**9)},
        {"step": "1"},
        {"metrics": [1]},
        {"metrics": [{}]},
        {"done": None},
        {"best": None},
        {"loss": []},
    ],
)
def test_a_checkpoint_with_another_state_is_refused(sent, dataset, change):
    last = sent / "run/last.safetensors"
    tensors, state = load_checkpoint(last)
    save_checkpoint(last, tensors, state | change)
    with pytest.raises(ValueError, match=r"last\.safetensors is damaged"):
        fit(CONFIG, dataset, sent / "run", resume=True)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("tables.0.last_step", lambda x: x[:-1]), ("tables.0.last_step", lambda x: x.long()), ("tables.0.history", lambda x: x[:0]),
        ("tables.0.history", lambda x: x.float()), ("tables.0.step", lambda x: x + 2**40), ("tables.0.block_step", lambda x: x - 9),
        ("tables.0.exp_avg_sq", lambda x: x[:-1]), ("tables.0.constants", lambda x: x[:1]),
        ("others.0.exp_avg", lambda x: x.reshape(-1)[:1]),
    ],
)  # fmt: skip
def test_a_checkpoint_with_another_optimizer_is_refused(sent, dataset, part, change):
    last = sent / "run/last.safetensors"
    tensors, state = load_checkpoint(last)
    name = f"optimizer.{part}"
    save_checkpoint(last, tensors | {name: change(tensors[name]).contiguous()}, state)
    with pytest.raises(ValueError, match=r"last\.safetensors does not fit config\.json"):
        fit(CONFIG, dataset, sent / "run", resume=True)


def test_evaluations_that_contradict_themselves_are_refused(sent, monkeypatch):
    from cafe.evaluation import _checksum

    assert command(monkeypatch, "evaluate", "--run", sent / "run", "--protocol", "full") == 0
    file = sent / "run" / Evaluation.file_name("test", "full")
    Evaluation.load(file)
    with np.load(file) as content:
        arrays = dict(content)
    meta = json.loads(str(arrays.pop("meta")))
    del meta["checksum"]
    changes = [
        lambda m, a: m.update(model=None), lambda m, a: m.update(seed="0"), lambda m, a: a.pop("greater/item"),
        lambda m, a: a.update({"greater/item": a["greater/item"][:-1]}), lambda m, a: a.update({"equal/item": -1 - a["equal/item"]}),
        lambda m, a: a.update(users=a["users"].astype(float)),
    ]  # fmt: skip
    for change in changes:
        other, parts = dict(meta), dict(arrays)
        change(other, parts)
        other["checksum"] = _checksum(other, parts)
        np.savez(file.open("wb"), meta=np.array(json.dumps(other)), **parts)
        with pytest.raises(ValueError, match="its parts contradict each other"):
            Evaluation.load(file)


def test_an_optimizer_takes_a_state_of_its_table_alone():
    table = torch.zeros(3, 2, requires_grad=True)
    optimizer = RowSparseAdam([table], mode="exact")
    table.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    saved["state"][0]["history"] = saved["state"][0]["history"][:1]
    with pytest.raises(ValueError, match="the state of table 0 is not one of RowSparseAdam"):
        optimizer.load_state_dict(saved)
