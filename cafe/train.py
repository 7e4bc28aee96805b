"""Training: Adam over packed batches, validation with early stopping, checkpoints that resume bit for bit.

What a run folder holds: cafe.runs. Every random choice of step s follows from (seed, s), so nothing but the weights and moments has to
be saved to resume. To resume starts from last.safetensors alone, so a process may be killed between any two writes: what was written
after it (a better best.safetensors, the half-written .NAME.tmp of a file) is written again, with the same bits.
"""

import math
import signal
import time
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
from cafe.checkpoint import save_checkpoint
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models import Model, build
from cafe.models.base import Batch
from cafe.plots import learned_masks, plot_curve, plot_theta
from cafe.runs import (
    check_device,
    check_out,
    hash_of,
    is_best,
    is_state,
    load_checked,
    locked,
    new_state,
    open_run,
    resume_command,
    write_metrics,
)
from cafe.validate import calibrate, validate
from cafe_kernels import RowSparseAdam
from cafe_kernels.host_table import give_back, lend

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
        ValueError: no GPU where `device` is one, the run in `out` has another configuration or dataset, there is nothing to
            train or validate on, or the loss is not finite. (On a GPU that is noticed when losses are read, up to
            STEPS_BETWEEN_READS steps later, yet always before anything is saved: what is saved has finite losses behind it.)
        FileExistsError: `out` holds something else, or a run and `resume` is not set.
        BlockingIOError: another process trains in `out`.
        Interrupted: Ctrl-C; the state is saved.

    Example:
        >>> model = fit(Config.make("sasrec", epochs=3), Dataset.load("beauty"), "runs/sasrec")  # doctest: +SKIP
    """
    out = Path(out)
    check_device(device)
    check_out(out, config, dataset, resume)
    if len(dataset.holdout("valid").users) == 0:
        raise ValueError("nobody to validate on: no user has three interactions or more")
    torch.manual_seed(config.seed)
    if table not in ("device", "host"):
        raise ValueError(f"table={table!r}: expected 'device' or 'host'")
    model, on_host = build(config, dataset), table == "host" and config.model != "poprec"
    place(model, torch.device(device), on_host)
    batches = None if config.model == "poprec" else Batches(config, dataset)
    with locked(out):  # from here on files are written
        check_out(out, config, dataset, resume)  # as another process may have left it
        open_run(out, config, dataset, data, resume)
        if batches is None:
            return _count(model, dataset, out, progress)
        with _interrupt_flag(out) as interrupted:
            return _train(
                model, dataset, batches, out, resume, device, on_host, checkpoint_seconds, progress, interrupted
            )


def _count(model: Model, dataset: Dataset, out: Path, progress: Callable[[dict[str, Any]], None]) -> Model:
    """`fit` for a model that has nothing to train."""
    line: dict[str, Any] = {"epoch": 0, "step": 0, "loss": 0.0, "valid": validate(model, dataset)}
    state = {"run": hash_of(asdict(model.config), dataset.fingerprint), "epoch": 0, "step": 0}
    save_checkpoint(out / "best.safetensors", dict(model.state_dict()), state)
    write_metrics(out, [line])
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
    run_hash = hash_of(asdict(config), dataset.fingerprint)
    optimizers = make_optimizers(model)
    state = new_state()
    if resume and (out / "last.safetensors").exists():
        former, state = state, load_checked(out / "last.safetensors", run_hash, partial(restore, model, optimizers))
        if not is_state(state, former, config.epochs * len(batches)):
            raise ValueError(
                f"{out / 'last.safetensors'} is damaged (its state is of another kind): restore it or train again"
            )
        if state["best_epoch"] >= 0:  # refused now if damaged, and not after hours of training
            load_checked(out / "best.safetensors", run_hash, lambda tensors: None)
    state["run"] = run_hash
    if resume:
        write_metrics(out, state["metrics"])
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
                raise Interrupted(f"interrupted after step {state['step']}; saved. Go on with: {resume_command(out)}")
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
            metrics["valid"] = validate(model, dataset)
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
        write_metrics(out, state["metrics"])
        progress(metrics | {"best_epoch": state["best_epoch"]})
        if interrupted() and not state["done"]:
            raise Interrupted(f"interrupted after step {state['step']}; saved. Go on with: {resume_command(out)}")
    plot_curve(out)
    if on_host:
        model.to("cpu")
    del optimizers  # two moments a weight make room for the calibration
    _calibrate(model, dataset, out)
    plot_masks(model, batches.train.lengths[batches.rows], out)
    return model.eval()


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
        check_finite(loss.item(), batch.step, model.config.lr)
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
        check_finite(value, step, lr)
        state["loss"] += value
    losses.clear()
    return value


def check_finite(loss: float, step: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss became {loss} at step {step}: start a new run with a lower --lr than {lr}")


def _make(batches: Batches, rows: list[np.ndarray], base: int, pin: bool, on_host: bool, number: int) -> Batch:
    batch = batches(rows[number], base + number)
    batch = batch.of_its_rows() if on_host else batch
    return batch.pinned() if pin else batch


def _calibrate(model: Model, dataset: Dataset, out: Path) -> None:
    """Loads the best checkpoint and calibrates it."""
    run_hash = hash_of(asdict(model.config), dataset.fingerprint)
    state = load_checked(out / "best.safetensors", run_hash, model.load_state_dict)
    if calibrate(model, dataset, state):
        save_checkpoint(out / "best.safetensors", dict(model.state_dict()), state)


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


@contextmanager
def _interrupt_flag(out: Path) -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is read between steps, so that no step is cut in half; a second Ctrl-C stops at once."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise Interrupted(f"stopped at once. Go on from what was saved last with: {resume_command(out)}")
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
