"""The folder of a run: what is in it, whether it may be begun or gone on with, and reading it back.

config.json         format, version, the configuration, the dataset (path and fingerprint), a checksum
best.safetensors    the model at its best validation
last.safetensors    model, optimizer and progress after the last finished step that was saved
metrics.jsonl       one line per epoch: loss, tokens/s, validation; written anew from last.safetensors, never read
curve.png           loss and validation by epoch
theta.png           ln theta against distance, where the model has a distance mask
"""

import hashlib
import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cafe.checkpoint import load_checkpoint, read_state, restore_checked
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import lock, read_sealed, seal, write_atomically
from cafe.models import Model, build
from cafe.shards import read_index

FORMAT, VERSION = "cafe-run", 4


def load_run(run: str | Path, data: str | Path | Dataset | None = None) -> tuple[Model, Dataset]:
    """The trained model (at its best validation) and its dataset; warns where the training is not finished.

    data: the dataset or where it is, if not where the run was trained.

    Raises:
        FileNotFoundError, ValueError: not a run, one of another version, damaged, or trained on another dataset.
    """
    run = Path(run)
    meta = read_run(run)
    dataset = dataset_of(run, meta, data)
    config = Config(**meta["config"])
    model = build(config, dataset)
    best = load_checked(run / "best.safetensors", hash_of(meta["config"], meta["fingerprint"]), model.load_state_dict)
    if not _progress(run).get("done") or (config.calibrates and "calibrated" not in best):
        warnings.warn(
            f"the training of {run} is not finished; this is its best model so far. Go on with: {resume_command(run)}",
            stacklevel=2,
        )
    return model.eval(), dataset


def _progress(run: Path) -> dict[str, Any]:
    """The state of the newest checkpoint, of one process or of many; done where a run was sent without."""
    last = run / "last.safetensors"
    if (run / "last.json").exists():
        last = run / "shards" / read_index(run, "last")["common"]
    return read_state(last) if last.exists() else {"done": True}


def dataset_of(run: Path, meta: dict[str, Any], data: str | Path | Dataset | None = None) -> Dataset:
    """The dataset that a run with this config.json (`meta`) was trained on, which is, or lies in, `data` if not where it was."""
    path = data or meta["data"]
    if path is None:
        raise ValueError(f"{run} does not say where its dataset is: give --data")
    dataset = path if isinstance(path, Dataset) else Dataset.load(path)
    if dataset.fingerprint != meta["fingerprint"]:
        raise ValueError(f"{run} was trained on another dataset than {path}: give the right one with --data")
    return dataset


def read_run(run: Path) -> dict[str, Any]:
    """config.json of a run folder."""
    try:
        meta = read_sealed(run / "config.json", FORMAT, VERSION, "train again")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{run} is not a run (no config.json): train one with `cafe train --out {run}`"
        ) from None
    try:
        Config(**meta["config"])
        if not isinstance(meta["data"], str | None) or not isinstance(meta["fingerprint"], str):
            raise TypeError("data and fingerprint must be text")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run / 'config.json'} is of another release ({error}): train again") from None
    return meta


def new_state() -> dict[str, Any]:
    """The progress of a training that begins, as it is saved with every checkpoint."""
    numbers = {"step": 0, "best": -1.0, "best_epoch": -1, "since_best": 0, "loss": 0.0, "done": False}
    return {**numbers, "metrics": []}


def is_best(state: dict[str, Any], value: float, epoch: int) -> bool:
    """Notes the validation of an epoch in `state`: is it better than all before?"""
    if value > state["best"]:
        state |= {"best": value, "best_epoch": epoch, "since_best": 0}
        return True
    state["since_best"] += 1
    return False


def is_state(state: dict[str, Any], like: dict[str, Any], steps: int) -> bool:
    """Has the state of last.safetensors the names and types that training keeps, and metrics that can be drawn?"""
    return (
        all(type(state.get(name)) is type(value) for name, value in like.items())
        and 0 <= state["step"] <= steps
        and all(
            isinstance(line, dict)
            and all(isinstance(line.get(name), int | float) for name in ("epoch", "step", "loss", "tokens_per_s"))
            and isinstance(valid := line.get("valid", {}), dict)
            and all(isinstance(value, int | float) for value in valid.values())
            and (not valid or "ndcg@10" in valid)
            for line in state["metrics"]
        )
    )


def write_metrics(out: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically({out / "metrics.jsonl": ["".join(json.dumps(line) + "\n" for line in lines).encode()]})


def resume_command(out: Path) -> str:
    command = "torchrun --nproc-per-node N -m cafe.distributed" if (out / "last.json").exists() else "cafe train"
    return f"{command} --resume --out {shlex.quote(str(out))}"


def hash_of(config: dict[str, Any], fingerprint: str) -> str:
    """Ties checkpoints to the config.json they were trained by."""
    return hashlib.blake2b(json.dumps([config, fingerprint], sort_keys=True).encode(), digest_size=16).hexdigest()


def load_checked(path: Path, run_hash: str, restore: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, Any]:
    """Passes the tensors of a checkpoint to `restore` and returns its state; one of another run is a ValueError."""
    tensors, state = load_checkpoint(path)
    restore_checked(path, state.get("run") == run_hash, restore, tensors)
    return state


def check_device(device: str) -> None:
    """Refuses (ValueError) a GPU where there is none."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f'device {device!r}: no GPU is usable here; train on "cpu"')


def check_out(out: Path, config: Config, dataset: Dataset, resume: bool, last: str = "last.safetensors") -> None:
    """Refuses a folder that can be neither begun nor, with `resume`, gone on with; writes nothing. last: what holds the progress."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is not an empty folder: choose another --out")
    ours = {".lock", ".config.json.tmp"}  # what is left of a process that was killed at once
    present = {entry.name for entry in out.iterdir()} - ours if out.exists() else set()
    if (other := {"last.json", "last.safetensors"} - {last}) & present:
        how = "torchrun --nproc-per-node N -m cafe.distributed" if "last.json" in other else "cafe train"
        raise ValueError(f"{out} holds a run of `{how}`: go on with that, or choose another --out")
    if "config.json" not in present:
        if resume:
            raise FileNotFoundError(f"{out} holds no run to resume: leave --resume out")
        if present:
            raise FileExistsError(f"{out} is not an empty folder: choose another --out")
        return
    meta = read_run(out)
    if not resume and present != {"config.json"}:  # a run that failed before it saved anything is begun again
        raise FileExistsError(f"{out} already holds a run: add --resume, or choose another --out")
    if resume and (meta["config"] != asdict(config) or meta["fingerprint"] != dataset.fingerprint):
        raise ValueError(f"{out} was started with another configuration or dataset: resume it with the same options")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; the lock file that stays means nothing by itself."""
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        lock(file, f"another process trains in {out}: wait for it, or choose another --out")
        yield
    finally:
        os.close(file)


def open_run(out: Path, config: Config, dataset: Dataset, data: str | Path | None, resume: bool) -> None:
    """Writes config.json of a run that begins."""
    if resume:
        return
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "config": asdict(config),
        "data": None if data is None else str(Path(data).resolve()),
        "fingerprint": dataset.fingerprint,
        "torch": torch.__version__,
    }
    write_atomically({out / "config.json": [seal(meta)]})
