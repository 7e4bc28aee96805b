"""Training: Adam over packed batches, validation with early stopping, checkpoints that resume bit for bit.

A run folder holds

    config.json         format, version, the configuration, the dataset (path and fingerprint), a checksum
    best.safetensors    the model at its best validation
    last.safetensors    model, optimizer and progress after the last finished step that was saved
    metrics.jsonl       one line per epoch: loss, tokens/s, validation; written anew from last.safetensors, never read
    curve.png           loss and validation by epoch
    theta.png           ln theta against distance, where the model has a distance mask

Every random choice of step s follows from (seed, s), so nothing but the weights and moments has to be saved to resume.
To resume starts from last.safetensors alone, so a process may be killed between any two writes: what was written after it
(a better best.safetensors, the half-written .NAME.tmp of a file) is written again, with the same bits.
"""

import hashlib
import json
import math
import os
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.func import functional_call

from cafe.batches import Batches, prefetch
from cafe.checkpoint import load_checkpoint, read_state, save_checkpoint
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.folders import lock, read_sealed, seal, write_atomically
from cafe.evaluate import evaluate, joint_name
from cafe.evaluation import Evaluation
from cafe.models import Model, build
from cafe.models.base import RANKINGS, Batch, Weights
from cafe.plots import learned_masks, plot_curve, plot_theta
from cafe_kernels import RowSparseAdam
from cafe_kernels.host_table import give_back, lend

FORMAT, VERSION = "cafe-run", 4
JOINT_WEIGHTS = (  # that calibration tries: of the intent, and of the item's prior
    (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0),
    (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7),
)
SCORES_TO_CALIBRATE = 10**8  # scores (users times items) that fitting the weight for the whole catalog may compute
PER_ITEM = {"item_intent", "trust"}  # buffers that the loss reads by item
SAVING_SHARE = 10  # saving takes at most one in so many seconds: a table of millions takes a slow disk a minute
STREAMS = 2**31  # seeds of steps: seed * STREAMS + step
STEPS_BETWEEN_READS = 50  # of the loss on a GPU, since to read it is to wait for the step


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in training: the state was saved; the message says how to go on."""


def fit(
    config: Config,
    dataset: Dataset,
    out: str | Path,
    *,
    data: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    table: str = "device",
    checkpoint_seconds: float = 60.0,
    progress: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Model:
    """Trains the model of `config` and keeps the run in the folder `out`.

    Args:
        data: where `dataset` is stored, kept with the run so that `cafe evaluate` and `recommend` find it.
        resume: go on with the run in `out`; the weights are bit-identical to those of an uninterrupted run on the same
            machine with the same number of threads.
        device: torch device.
        table: where the item table and its optimizer's state are. "host" is for tables larger than the device: a step's rows visit it
            (cafe_kernels.host_table), and validation is on the CPU. The result is the same.
        checkpoint_seconds: about this often the state is saved, but not so often that saving takes a tenth of the time; 0
            saves after every step.
        progress: called with {"step", "steps", "tokens", "loss"} after each step and with the metrics of each epoch. On a GPU the
            loss is the newest that was read.

    Returns:
        The model at its best validation.

    Raises:
        ValueError: the run in `out` has another configuration or dataset, there is nothing to train or validate on, or the
            loss is not finite. (On a GPU that is noticed when losses are read, up to STEPS_BETWEEN_READS steps later, yet always
            before anything is saved: what is saved has finite losses behind it.)
        FileExistsError: `out` holds something else, or a run and `resume` is not set.
        BlockingIOError: another process trains in `out`.
        Interrupted: Ctrl-C; the state is saved.

    Example:
        >>> model = fit(Config.make("sasrec", epochs=3), Dataset.load("beauty"), "runs/sasrec")  # doctest: +SKIP
    """
    out = Path(out)
    _check_out(out, config, dataset, resume)
    if len(dataset.holdout("valid").users) == 0:
        raise ValueError("nobody to validate on: no user has three interactions or more")
    torch.manual_seed(config.seed)
    if table not in ("device", "host"):
        raise ValueError(f"table={table!r}: expected 'device' or 'host'")
    model, on_host = build(config, dataset), table == "host" and config.model != "poprec"
    place(model, torch.device(device), on_host)
    batches = None if config.model == "poprec" else Batches(config, dataset)
    with _locked(out):  # from here on files are written
        _check_out(out, config, dataset, resume)  # as another process may have left it
        _open_run(out, config, dataset, data, resume)
        if batches is None:
            return _count(model, dataset, out, progress)
        with _interrupt_flag(out) as interrupted:
            return _train(
                model, dataset, batches, out, resume, device, on_host, checkpoint_seconds, progress, interrupted
            )


def _count(model: Model, dataset: Dataset, out: Path, progress: Callable[[dict[str, Any]], None]) -> Model:
    """`fit` for a model that has nothing to train."""
    line: dict[str, Any] = {"epoch": 0, "step": 0, "loss": 0.0, "valid": _validate(model, dataset)}
    state = {"run": _run_hash(asdict(model.config), dataset.fingerprint), "epoch": 0, "step": 0}
    save_checkpoint(out / "best.safetensors", dict(model.state_dict()), state)
    _write_metrics(out, [line])
    progress(line)
    return model


def _train(
    model: Model,
    dataset: Dataset,
    batches: Batches,
    out: Path,
    resume: bool,
    device: str,
    on_host: bool,
    checkpoint_seconds: float,
    progress: Callable[[dict[str, Any]], None],
    interrupted: Callable[[], bool],
) -> Model:
    """The loop of `fit`, and the calibration and plots after it, which a first Ctrl-C does not stop."""
    config = model.config
    run_hash = _run_hash(asdict(config), dataset.fingerprint)
    optimizers = make_optimizers(model)
    state = new_state()
    if resume and (out / "last.safetensors").exists():
        former, state = state, _load(out / "last.safetensors", run_hash, partial(restore, model, optimizers))
        if not _is_state(state, former, config.epochs * len(batches)):
            raise ValueError(
                f"{out / 'last.safetensors'} is damaged (its state is of another kind): restore it or train again"
            )
        if state["best_epoch"] >= 0:  # refused now if damaged, and not after hours of training
            _load(out / "best.safetensors", run_hash, lambda tensors: None)
    state["run"] = run_hash
    if resume:
        _write_metrics(out, state["metrics"])
    to_save, saved, target = 0.0, time.monotonic(), torch.device(device)
    pin = target.type == "cuda"
    losses: list[torch.Tensor] = []  # of the last steps, not read yet
    shown = math.nan
    while not state["done"]:
        epoch, first = divmod(state["step"], len(batches))
        rows = np.array_split(batches.order(epoch), range(config.batch_size, len(batches.rows), config.batch_size))
        make = partial(_make, batches, rows, epoch * len(batches), pin, on_host)
        started, tokens = time.monotonic(), 0
        made = prefetch(make, range(first, len(batches)))
        model.train()
        for batch in made:
            losses.append(train_step(model, optimizers, batch.to(target)))
            state["step"] += 1
            tokens += len(batch.items)
            if target.type == "cpu" or len(losses) == STEPS_BETWEEN_READS or math.isnan(shown):
                shown = _read(losses, state, config.lr)
            progress(
                {
                    "step": state["step"],
                    "steps": config.epochs * len(batches),
                    "tokens": len(batch.items),
                    "loss": shown,
                }
            )
            if state["step"] % len(batches) == 0:
                break  # what ends the epoch must be in the checkpoint too
            due = checkpoint_seconds and max(checkpoint_seconds, SAVING_SHARE * to_save)
            if interrupted() or time.monotonic() - saved > due:
                _read(losses, state, config.lr)
                to_save, saved = _save_last(out, model, optimizers, state), time.monotonic()
            if interrupted():
                raise Interrupted(f"interrupted after step {state['step']}; saved. Go on with: {_resume_command(out)}")
        _read(losses, state, config.lr)
        seconds = time.monotonic() - started
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": state["step"],
            "loss": state["loss"] / len(batches),
            "tokens_per_s": tokens / seconds,
        }
        state["loss"] = 0.0
        optimizers.tables.flush()
        last_epoch = epoch + 1 >= config.epochs
        if (epoch + 1) % config.valid_every == 0 or last_epoch:
            if on_host:
                model.to("cpu")
            metrics["valid"] = _validate(model, dataset)
            place(model, target, on_host)
            if is_best(state, metrics["valid"]["ndcg@10"], epoch):
                save_checkpoint(
                    out / "best.safetensors",
                    dict(model.state_dict()),
                    {"run": run_hash, "epoch": epoch, "step": state["step"], **metrics["valid"]},
                )
        state["done"] = last_epoch or state["since_best"] >= config.patience
        state["metrics"].append(metrics)
        to_save, saved = _save_last(out, model, optimizers, state), time.monotonic()
        _write_metrics(out, state["metrics"])
        progress(metrics | {"best_epoch": state["best_epoch"]})
        if interrupted() and not state["done"]:
            raise Interrupted(f"interrupted after step {state['step']}; saved. Go on with: {_resume_command(out)}")
    plot_curve(out)
    if on_host:
        model.to("cpu")
    del optimizers  # two moments a weight make room for the calibration
    _calibrate(model, dataset, out)
    plot_masks(model, batches.train.lengths[batches.rows], out)
    return model.eval()


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


def plot_masks(model: Model, lengths: np.ndarray, out: Path) -> None:
    """theta.png, where the model has distance masks; lengths: of the sequences that were trained on."""
    if masks := list(learned_masks(model).values()):
        lengths = np.minimum(lengths - 1, model.config.max_len)
        plot_theta([mask.theta_curves() for mask in masks], lengths, out / "theta.png", masks[0].causal)


class Optimizers(NamedTuple):
    """`tables` moves the rows that a step read; all others follow on `flush`, to where dense Adam would have them."""

    tables: RowSparseAdam
    others: torch.optim.AdamW


def place(model: Model, device: torch.device, on_host: bool) -> None:
    """Moves the model to `device`, `on_host` without its item table, which stays on the CPU."""
    names = [name for name, p in model.named_parameters() if on_host and p is model.tables()[0]]
    kept = {name: model._parameters.pop(name) for name in names}
    model.to(device)
    model._parameters.update(kept)


def make_optimizers(model: Model) -> Optimizers:
    """Adam with decoupled weight decay, as the model's configuration says."""
    options: dict[str, Any] = {"lr": model.config.lr, "weight_decay": model.config.weight_decay}
    tables = model.tables()
    others = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
    return Optimizers(RowSparseAdam(tables, mode="exact", **options), torch.optim.AdamW(others, fused=True, **options))


def train_step(model: Model, optimizers: Optimizers, batch: Batch) -> torch.Tensor:
    """One step on `batch`, whose number fixes the dropout; returns the loss, a scalar tensor. It never waits for a GPU, unless the
    table is in host memory (batch.rows).

    Raises:
        ValueError: on the CPU, the loss is not finite; the weights are then as before.
    """
    torch.manual_seed(model.config.seed * STREAMS + batch.step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    rows_read = model.rows_read(batch)
    if batch.rows is not None:
        rows_read[0] = batch.rows
    for table, rows in zip(model.tables(), rows_read, strict=True):
        optimizers.tables.catch_up(table, rows)
    lent: dict[str, torch.Tensor] = {}
    device = batch.items.device
    if batch.rows is not None:
        lent = {name: lend(p, batch.rows, device) for name, p in model.named_parameters() if p is model.tables()[0]}
        names = [name for name in PER_ITEM if hasattr(model, name)]
        lent |= {name: getattr(model, name)[batch.rows.to(device, non_blocking=True)] for name in names}
    low = model.config.precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        loss = functional_call(model, lent, (batch,)) if lent else model.loss(batch)
    if loss.device.type == "cpu":
        _check_finite(loss.item(), batch.step, model.config.lr)
    loss.backward()
    for name in lent.keys() - PER_ITEM:
        assert batch.rows is not None
        give_back(model.get_parameter(name), batch.rows, lent[name])
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def _read(losses: list[torch.Tensor], state: dict[str, Any], lr: float) -> float:
    """Adds the losses up to state["step"] to state["loss"], empties the list and returns the newest."""
    value = math.nan
    for step, value in enumerate(torch.stack(losses).tolist() if losses else [], state["step"] - len(losses)):
        _check_finite(value, step, lr)
        state["loss"] += value
    losses.clear()
    return value


def _check_finite(loss: float, step: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss became {loss} at step {step}: start a new run with a lower --lr than {lr}")


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
    best = _load(run / "best.safetensors", _run_hash(meta["config"], meta["fingerprint"]), model.load_state_dict)
    last = run / "last.safetensors"
    if (last.exists() and not read_state(last).get("done")) or (_calibrates(config) and "calibrated" not in best):
        warnings.warn(
            f"the training of {run} is not finished; this is its best model so far. Go on with: {_resume_command(run)}",
            stacklevel=2,
        )
    return model.eval(), dataset


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


def _resume_command(out: Path) -> str:
    return f"cafe train --resume --out {shlex.quote(str(out))}"


def _run_hash(config: dict[str, Any], fingerprint: str) -> str:
    """Ties checkpoints to the config.json they were trained by."""
    return hashlib.blake2b(json.dumps([config, fingerprint], sort_keys=True).encode(), digest_size=16).hexdigest()


def _load(path: Path, run_hash: str, restore: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, Any]:
    """Passes the tensors of a checkpoint to `restore` and returns its state; one of another run is a ValueError."""
    tensors, state = load_checkpoint(path)
    try:
        if state.get("run") != run_hash:
            raise RuntimeError
        restore(tensors)
    except Exception:  # what torch and cafe_kernels say of another model's tensors is of many kinds
        raise ValueError(
            f"{path} does not fit config.json: config.json was altered, or this is the checkpoint of another run; "
            "restore it or train again"
        ) from None
    return state


def _calibrates(config: Config) -> bool:
    return config.calibrate and config.model == "cafe"


def _make(batches: Batches, rows: list[np.ndarray], base: int, pin: bool, on_host: bool, number: int) -> Batch:
    batch = batches(rows[number], base + number)
    batch = batch.of_its_rows() if on_host else batch
    return batch.pinned() if pin else batch


def _validate(
    model: Model, dataset: Dataset, protocol: str | None = None, users: int | None = None
) -> dict[str, float]:
    """NDCG@10 on the validation answers; where the configuration says so, the joint score's weights are fitted first."""
    config = model.config
    protocol = protocol or config.valid_protocol

    def ranked(tried: list[Weights]) -> Evaluation:
        return evaluate(
            model,
            dataset,
            "valid",
            protocol,
            max_users=users or config.valid_users,
            tried=tried,
            # Of many users at once: the index reads the catalog once for them; of few: candidates take memory.
            batch_size=1024 if protocol == "full" else 256,
        )

    if not _calibrates(config):
        result = ranked([])
        return {metric: result.mean(metric) for metric in ("ndcg@10", "hr@10")}
    best = 0.0, 0.0
    for axis in (0, 1, 0) if protocol == "full" else (0,):  # one weight after the other
        tried = [(value, best[1]) if axis == 0 else (best[0], value) for value in JOINT_WEIGHTS[axis]]
        result = ranked(tried)
        best = max(tried, key=lambda weights: result.mean("ndcg@10", joint_name(weights)))
    model.intent_weight[RANKINGS.index(protocol)] = best[0]
    if protocol == "full":
        model.prior_weight.fill_(best[1])
    found = {metric: result.mean(metric, joint_name(best)) for metric in ("ndcg@10", "hr@10")}
    return found | {"intent_weight": best[0], "prior_weight": best[1]}


def _calibrate(model: Model, dataset: Dataset, out: Path) -> None:
    """Loads the best checkpoint and calibrates it."""
    run_hash = _run_hash(asdict(model.config), dataset.fingerprint)
    state = _load(out / "best.safetensors", run_hash, model.load_state_dict)
    if calibrate(model, dataset, state):
        save_checkpoint(out / "best.safetensors", dict(model.state_dict()), state)


def calibrate(model: Model, dataset: Dataset, state: dict[str, Any]) -> bool:
    """Fits the weights of the rankings that validation did not fit, on as many users as is cheap, and notes it in the checkpoint's
    `state`; False where there is nothing to do."""
    config = model.config
    if not _calibrates(config) or "calibrated" in state:
        return False
    users = max(200, min(config.valid_users, SCORES_TO_CALIBRATE // dataset.num_items))
    for protocol in set(RANKINGS) - {config.valid_protocol}:
        state["calibrated"] = {protocol: _validate(model, dataset, protocol, users)}
    return True


def _check_out(out: Path, config: Config, dataset: Dataset, resume: bool, last: str = "last.safetensors") -> None:
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
def _locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; the lock file that stays means nothing by itself."""
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        lock(file, f"another process trains in {out}: wait for it, or choose another --out")
        yield
    finally:
        os.close(file)


def _open_run(out: Path, config: Config, dataset: Dataset, data: str | Path | None, resume: bool) -> None:
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


def _save_last(out: Path, model: Model, optimizers: Optimizers, state: dict[str, Any]) -> float:
    """Saves what `restore` needs; returns the seconds it took."""
    began = time.monotonic()
    save_checkpoint(out / "last.safetensors", state_tensors(model, optimizers), state)
    return time.monotonic() - began


def state_tensors(model: Model, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """All that `restore` needs."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for part, optimizer in zip(Optimizers._fields, optimizers, strict=True):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{part}.{index}.{key}": value for key, value in values.items()}
    return tensors


def restore(model: Model, optimizers: Optimizers, tensors: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for part, optimizer in zip(Optimizers._fields, optimizers, strict=True):
        saved = optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{part}."):
                index, key = name.split(".")[2:]
                saved["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(saved)
        for parameter, values in optimizer.state.items():
            if values and any(values[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("moments of another shape")


def _is_state(state: dict[str, Any], like: dict[str, Any], steps: int) -> bool:
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


def _write_metrics(out: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically({out / "metrics.jsonl": ["".join(json.dumps(line) + "\n" for line in lines).encode()]})


@contextmanager
def _interrupt_flag(out: Path) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is read between steps, so that no step is cut in half; a second Ctrl-C stops at once."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise Interrupted(f"stopped at once. Go on from what was saved last with: {_resume_command(out)}")
        pressed = True

    try:
        former = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, former)
