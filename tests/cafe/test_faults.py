"""Kills, damaged files and full disks: nothing saved is lost, and nothing damaged is read."""

import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from cafe.checkpoint import load_checkpoint, read_state, save_checkpoint
from cafe.cli import main
from cafe.config import Config
from cafe.data.dataset import FILES, Dataset
from cafe.data.folders import read_sealed, seal, write_atomically
from cafe.data.simulate import simulate
from cafe.train import fit
from tests.faults import equal

TINY = {"dim": 16, "max_len": 8, "batch_size": 32, "epochs": 2}
CONFIG = Config.make("cafe", "best", **TINY)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_no_more_than_a_step_and_never_a_checkpoint(kills):
    command = [sys.executable, "-m", "tests.faults", "--kills", str(kills), "--seed", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    assert "no checkpoint lost" in done.stdout


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A prepared folder, and a run that is finished."""
    folder = tmp_path_factory.mktemp("whole")
    dataset.save(folder / "data")
    fit(CONFIG, dataset, folder / "run", data=folder / "data")
    return folder


@contextmanager
def written(path, content):
    """The file is `content` in the block."""
    former = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(former)


def damages(content, rng, flips):
    """Names and copies of `content`, one bit flipped (in the first and last 8 bytes, and anywhere) or the end cut off."""
    for position in [
        *rng.integers(0, 8, 2),
        *rng.integers(0, len(content), flips),
        *(len(content) - rng.integers(1, 9, 2)),
    ]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        yield f"bit of byte {position}", bytes(flipped)
    for size in (0, int(rng.integers(1, len(content))), len(content) - 1):
        yield f"cut to {size}", content[:size]


def cafe(monkeypatch, capsys, *arguments):
    """Exit code, what was printed and what was said, of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["cafe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


COMMANDS = {
    "resume": "train --resume --json --out",
    "evaluate": "evaluate --json --max-users 20 --run",
    "compare": "compare --json --max-users 20 --protocol full",
    "recommend": "recommend --json --user u1 --run",
}
DAMAGED = [*(f"data/{name}" for name in ("meta.json", *FILES)), "run/config.json", "run/best.safetensors"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore")
def test_every_command_refuses_every_damaged_file_that_it_reads_by_name(whole, monkeypatch, capsys, name):
    """Each damage alone, in a folder that is otherwise whole, and nothing changed by it."""
    command = [*COMMANDS[name].split(), whole / "run"]
    rng = np.random.default_rng(sorted(COMMANDS).index(name))
    assert cafe(monkeypatch, capsys, *command)[0] == 0
    for file in [*DAMAGED, *["run/last.safetensors"] * (name == "resume")]:
        path = whole / file
        for damage, content in damages(path.read_bytes(), rng, 4):
            before = {entry: entry.read_bytes() for entry in path.parent.iterdir() if entry != path}
            with written(path, content):
                code, out, err = cafe(monkeypatch, capsys, *command)
            where = f"{file}, {damage}: {err}"
            assert (code, out, err.count("\n")) == (1, "", 1), where
            assert err.startswith(f"error: {path} "), where
            assert re.search("prepare the data again|train again|train it again|restore it", err), where
            assert before == {entry: entry.read_bytes() for entry in before}, where


def test_what_a_command_does_not_read_cannot_mislead_it(whole, monkeypatch, capsys):
    """metrics.jsonl is written anew from the checkpoint; of last.safetensors, who does not resume reads the state alone."""
    rng = np.random.default_rng(0)
    log, last = whole / "run" / "metrics.jsonl", whole / "run" / "last.safetensors"
    expected = log.read_bytes()
    for content in (expected[:-9], b"{" + expected):
        log.write_bytes(content)
        fit(CONFIG, Dataset.load(whole / "data"), whole / "run", data=whole / "data", resume=True)
        assert log.read_bytes() == expected
    command = [*COMMANDS["recommend"].split(), whole / "run"]
    expected = cafe(monkeypatch, capsys, *command)
    content = last.read_bytes()
    state = content.index(b'"state"')
    near = (
        (f"at {state + place}", content[: state + place] + b"\xff" + content[state + place + 1 :]) for place in (2, 50)
    )
    refused = []
    for damage, damaged in [*damages(content, rng, 20), *near]:
        with written(last, damaged):
            code, out, err = cafe(monkeypatch, capsys, *command)
        if (code, out, err) != expected:
            refused.append(damage)
            assert code == 1, damage
            assert err.startswith(f"error: {last} is damaged"), damage
    assert {damage[:3] for damage in refused} == {"bit", "cut", "at "}
    assert len([damage for damage in refused if damage[:3] != "bit"]) == 5


def bits(path):
    """Every one-bit damage of a file, written to it in turn."""
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield content[bit // 8], damaged[bit // 8]


def tried(read, path, *arguments):
    """What was read, or "refused" if it was by the name of the file."""
    try:
        return read(path, *arguments)
    except ValueError as error:
        return "refused" if str(error).startswith(f"{path} ") else str(error)


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {"step": 7}
    save_checkpoint(path, {"a": torch.arange(2.0)}, state)
    for _ in bits(path):
        with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
            load_checkpoint(path)
        assert tried(read_state, path) in (state, "refused")  # elsewhere a bit does not matter to it


def test_every_bit_of_a_sealed_file_counts(tmp_path):
    path = tmp_path / "x.json"
    meta = {"format": "thing", "version": 1, "number": 1e-5, "text": "\u00e9", "list": [None, True, {"a": 0.1}]}
    write_atomically({path: [seal(meta)]})
    accepted = []
    for former, new in bits(path):
        if (found := tried(read_sealed, path, "thing", 1, "do this")) != "refused":
            assert found == meta
            accepted.append((former, new))
    assert accepted == [(ord("e"), ord("E"))] * 2  # 1E-05 is 1e-05 and \u00E9 is \u00e9


@contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes, as if the disk were full then: part of it is written, and the rest fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ, so that it is an OSError
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


class Stop(Exception):
    pass


@pytest.mark.parametrize("every", [0, 60])
@pytest.mark.parametrize("name", ["metrics.jsonl", "best.safetensors", "last.safetensors", "curve.png", "theta.png"])
def test_a_disk_full_while_training_keeps_the_checkpoint_and_a_resume_ends_as_if_it_had_not_been(
    dataset, whole, tmp_path, name, every
):
    def stop(event):
        if event["step"] == 3:
            raise Stop

    run, options = tmp_path / "run", {"data": whole / "data", "checkpoint_seconds": every}
    with pytest.raises(Stop):
        fit(CONFIG, dataset, run, data=whole / "data", checkpoint_seconds=0, progress=stop)
    size = (whole / "run" / name).stat().st_size - 1
    with (
        room_for(size),
        pytest.raises(OSError, match=r"cannot write .*File too large.*; what was there before is kept"),
    ):
        fit(CONFIG, dataset, run, resume=True, **options)
    assert not list(run.glob(".*.tmp"))
    assert load_checkpoint(run / "last.safetensors")[1]["step"] >= 2
    fit(CONFIG, dataset, run, resume=True, **options)
    assert equal(run, whole / "run")


def test_a_disk_full_at_the_start_can_be_started_again(dataset, whole, tmp_path, monkeypatch):
    with room_for(10), pytest.raises(OSError, match=r"cannot write .*config\.json"):
        fit(CONFIG, dataset, tmp_path / "run", data=whole / "data")
    assert contents(tmp_path / "run") == {".lock": b""}
    (tmp_path / "run" / ".config.json.tmp").write_bytes(b"{")  # so SIGKILL in the first write of all leaves it
    fit(CONFIG, dataset, tmp_path / "run", data=whole / "data")
    assert equal(tmp_path / "run", whole / "run")


def test_a_disk_full_keeps_the_former_dataset(dataset, other_dataset, tmp_path):
    dataset.save(tmp_path / "data")
    former = contents(tmp_path / "data")
    other_dataset.save(tmp_path / "other")
    for name in ("meta.json", *FILES):
        size = (tmp_path / "other" / name).stat().st_size - 1
        with room_for(size), pytest.raises(OSError, match="File too large; what was there before is kept"):
            other_dataset.save(tmp_path / "data")
        assert contents(tmp_path / "data") == former
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "other"]
    other_dataset.save(tmp_path / "data")
    assert Dataset.load(tmp_path / "data").fingerprint == other_dataset.fingerprint


@pytest.mark.parametrize("name", ["interactions", "items"])
def test_a_disk_full_keeps_both_former_files_of_a_simulated_shop(tmp_path, name):
    """Were one of them replaced, the two would not be of one shop."""
    paths = simulate("demo", tmp_path)
    former = contents(tmp_path)
    size = paths[name].stat().st_size - 100  # of the other seed's, too, one does not fit
    with room_for(size), pytest.raises(OSError, match="File too large; what was there before is kept"):
        simulate("demo", tmp_path, seed=1)
    assert contents(tmp_path) == former


def test_a_command_that_finds_the_disk_full_says_so_in_one_line(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "buys.csv").write_text("user,item,timestamp\na,x,1\na,y,2\nb,x,1\n")
    for command in (
        ["train", "--data", whole / "data", "--out", tmp_path / "out", "--epochs", 1],
        ["prepare", "--interactions", tmp_path / "buys.csv", "--out", tmp_path / "out"],
        ["simulate", "--out", tmp_path / "out"],
    ):
        with room_for(100):
            code, out, err = cafe(monkeypatch, capsys, *command)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, len(errors)) == (1, "", 1), err
        assert re.search(r"cannot write \S*out\S*: File too large; what was there before is kept", errors[0])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["buys.csv"]


def test_tensors_of_a_checkpoint_are_aligned(tmp_path):
    """The odd number of int32 before them puts the float64 between their borders in the file."""
    tensors = {"a": torch.arange(3, dtype=torch.int32), "b": torch.arange(5, dtype=torch.float64)}
    save_checkpoint(tmp_path / "x.safetensors", tensors, {})
    loaded, _ = load_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in loaded.values())
