"""Training on several processes and machines: the encoders data parallel, the item table spread over the ranks by TorchRec.

    torchrun --nproc-per-node 4 -m cafe.distributed --data data/shop --model cafe --preset best --out runs/cafe

The options are those of `cafe train`; --batch-size is that of all ranks together, --out a folder that all of them see. A step:

    part    = this rank's sequences of the step's batch, with their part of the step's negatives   (cafe.batches: `before`)
    rows    = the distinct rows of the table that `part` reads, fetched from their owners          (TorchRec, all to all)
    loss    = mean loss of `part` times its share of the step's tokens, on a table of `rows` alone (as with --table host)
    owners  <- gradient of `rows`                                                                  (TorchRec, all to all)
    all     <- sum over ranks of the loss and of the gradients of everything else                  (one all-reduce)

then RowSparseAdam on each rank's own rows and AdamW on the rest. So a step is that of one process with the same batch, but for the
order of sums, and for dropout, which each rank draws for itself: one rank has the numbers of `cafe train`, several others.

A run folder holds what `cafe train` leaves, but in place of last.safetensors

    last.json, best.json    which files in shards/ make up the last checkpoint, and the best one
    shards/                 the rows of each rank, and what every rank has; any number of ranks reads them

best.safetensors, which `cafe evaluate` and `recommend` read, is written at the end of training, or before by
`python -m cafe.distributed --export --out runs/cafe`. docs/scale.md has the plan for 100 million items and more.
"""

import argparse
import os
import re
import secrets
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from cafe.batches import Batches, prefetch
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models import MODELS
from cafe.models.base import Batch, Model
from cafe.plots import plot_curve
from cafe.runs import check_device, check_out, hash_of, is_best, is_state, locked, new_state, open_run, write_metrics
from cafe.sharding import Sharded, ShardedTable
from cafe.shards import Checkpoints, export, read_index
from cafe.train import (
    SAVING_SHARE,
    STREAMS,
    Interrupted,
    Optimizers,
    check_finite,
    make_optimizers,
    plot_masks,
    restore,
    state_tensors,
)
from cafe.validate import calibrate, validate

MODELS_HERE = ("sasrec", "cafe")
SILENCE = 45  # seconds without a word from a rank until the others give it up; while files are written:
PATIENCE = timedelta(hours=2)


class RankLost(ConnectionError):
    """Another rank died or fell silent."""


class Part(NamedTuple):
    """A rank's part of a step's batch: share of the step's tokens, and how many these are."""

    batch: Batch
    share: float
    tokens: int


def make_part(batches: Batches, rows: np.ndarray, step: int, rank: int, ranks: int) -> Part:
    """Cuts the sequences `rows` of a step into consecutive parts of about as many tokens each. A rank that is left without any
    gets one that counts for nothing."""
    longest, indptr = batches.config.max_len, batches.train.indptr
    tokens = np.minimum(indptr[rows + 1] - indptr[rows] - 1, longest)
    ends = np.cumsum(tokens)
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, ranks) / ranks)
    start, stop = [0, *cuts, len(rows)][rank : rank + 2]
    mine = slice(start, stop) if start < stop else slice(0, 1)
    before = int(ends[mine.start] - tokens[mine.start])
    batch = batches(rows[mine], step, before)
    share = float(tokens[start:stop].sum() / ends[-1])
    # The number of the step fixes the dropout, which no two ranks should share.
    return Part(replace(batch, step=step * ranks + rank).of_its_rows(), share, int(ends[-1]))


def train_step(
    model: Sharded, optimizers: Optimizers, part: Part, flags: tuple[bool, ...] = ()
) -> tuple[float, list[bool]]:
    """One step of all ranks; returns the loss of the whole batch, and of each flag whether a rank has raised it.

    Raises:
        ValueError: the loss is not finite; the weights are then as before.
    """
    table, config = model.table, model.model.config
    batch, device = part.batch.to(table.device), table.device
    assert batch.rows is not None
    torch.manual_seed(config.seed * STREAMS + batch.step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    fetched = table.fetch(batch.rows, optimizers.tables.catch_up)
    rows = fetched.detach().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        loss = model.on_rows(batch.rows.to(device), rows, "loss", batch) * part.share
    loss.backward()
    assert rows.grad is not None
    fetched.backward(rows.grad.to_dense())
    table.gather_gradient()
    gradients = [p.grad for group in optimizers.others.param_groups for p in group["params"] if p.grad is not None]
    numbers = torch.cat([loss.detach()[None], loss.new_tensor([float(flag) for flag in flags])])
    summed = torch.cat([numbers, *(gradient.reshape(-1) for gradient in gradients)])
    dist.all_reduce(summed)
    numbers, *parts = summed.split([len(numbers), *(gradient.numel() for gradient in gradients)])
    for gradient, total in zip(gradients, parts, strict=True):
        gradient.copy_(total.view_as(gradient))
    value, *raised = numbers.tolist()
    check_finite(value, batch.step // dist.get_world_size(), config.lr)
    for one in optimizers:
        one.step()
    return value, [flag > 0 for flag in raised]


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
    """As cafe.train.fit, called by every rank; its progress goes to rank 0.

    A run that is resumed on as many ranks has the weights of an uninterrupted one, bit for bit on the same machines; on another
    number of ranks, those but for the order of sums (and, with dropout, other draws).

    Raises:
        ValueError: as there, and for what is not trained here: other models than sasrec and cafe, the softmax over all items, fewer
            items than ranks have use for, table="host".
        RankLost: a rank died or was silent for SILENCE seconds; the message says how to go on.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.

    Example, in a script for torchrun:
        >>> fit(Config.make("cafe", "best", epochs=3), Dataset.load("data/shop"), "runs/cafe")  # doctest: +SKIP
    """
    out = Path(out)
    check_device(device)
    if config.model not in MODELS_HERE or config.loss == "full":
        raise ValueError(
            f"model={config.model!r} with loss={config.loss!r}: cafe.distributed trains {' and '.join(MODELS_HERE)} with sampled "
            "losses (bce, softmax); train others with `cafe train`"
        )
    if table != "device":
        raise ValueError(
            f"table={table!r}: on several ranks each keeps its rows on its device; leave --table out, or use more ranks"
        )
    if len(dataset.holdout("valid").users) == 0:
        raise ValueError("nobody to validate on: no user has three interactions or more")
    if not dist.is_initialized() and "RANK" not in os.environ:
        raise ValueError("cafe.distributed runs under torchrun: torchrun --nproc-per-node 2 -m cafe.distributed ...")
    # torchrun --max-restarts starts all ranks again with the same options
    resume = resume or (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (out / "config.json").exists())
    with _lost_ranks(out), _processes(device) as (where, group), _signals() as stopped:
        first, ranks = dist.get_rank() == 0, dist.get_world_size()
        options = {f"option {name}": value for name, value in asdict(config).items()}
        _agree(options | {"dataset": dataset.fingerprint, "--resume": resume, "torch": torch.__version__}, group)
        if (ranks - 1) * -(-dataset.num_items // ranks) >= dataset.num_items:
            raise ValueError(f"{dataset.num_items} items leave some of {ranks} ranks without any: use fewer ranks")
        check_out(out, config, dataset, resume, "last.json")
        dist.barrier(group=group)
        with locked(out) if first else nullcontext():
            if first:
                check_out(out, config, dataset, resume, "last.json")
                open_run(out, config, dataset, data, resume)
            _check_shared(out, group)
            model = build(config, dataset, where)
            folder = Checkpoints(out, hash_of(asdict(config), dataset.fingerprint), model.table, group)
            if not first:
                progress = lambda event: None  # noqa: E731
            _train(model, dataset, folder, resume, checkpoint_seconds, progress, stopped)
            _finish(model, dataset, folder)
    return cast(Model, model.eval())


def build(config: Config, dataset: Dataset, device: torch.device) -> Sharded:
    """The model of `config` as cafe.models.build makes it by torch.manual_seed(config.seed), of the item table this rank's rows."""
    table = ShardedTable(dataset.num_items, config.dim, device)
    torch.manual_seed(config.seed)
    model = cast(Any, MODELS[config.model])(config, dataset, range(table.first, table.stop))
    with torch.no_grad():
        table.shard.copy_(model.item_embedding)
    model.item_embedding = table.shard
    return Sharded(model.to(device), table)


def _train(
    model: Sharded,
    dataset: Dataset,
    folder: Checkpoints,
    resume: bool,
    checkpoint_seconds: float,
    progress: Callable[[dict[str, Any]], None],
    stopped: Callable[[], bool],
) -> None:
    """The loop of cafe.train, in step on all ranks."""
    config, rank, ranks = model.config, dist.get_rank(), dist.get_world_size()
    batches = Batches(config, dataset)
    optimizers = make_optimizers(model.model)
    state = new_state()
    if resume and (folder.out / "last.json").exists():
        former, state = state, folder.load("last", partial(restore, model.model, optimizers))
        if not is_state(state, former, config.epochs * len(batches)):
            raise ValueError(f"{folder.out / 'last.json'} is damaged (its state is of another kind): train again")
        if state["best_epoch"] >= 0:  # refused now if damaged, and not after hours of training
            folder.load("best", lambda tensors: None)
    to_save, saved, stop = 0.0, time.monotonic(), False
    folder.barrier()  # some take longer to read the data

    def save() -> tuple[float, float]:
        began = time.monotonic()
        folder.save("last", state_tensors(model.model, optimizers), state)
        return time.monotonic() - began, time.monotonic()

    while not state["done"]:
        epoch, start = divmod(state["step"], len(batches))
        rows = np.array_split(batches.order(epoch), range(config.batch_size, len(batches.rows), config.batch_size))
        started, tokens = time.monotonic(), 0
        model.train()

        def make(number: int, rows: list[np.ndarray] = rows, epoch: int = epoch) -> Part:
            part = make_part(batches, rows[number], epoch * len(batches) + number, rank, ranks)
            return part._replace(batch=part.batch.pinned()) if model.table.device.type == "cuda" else part

        for part in prefetch(make, range(start, len(batches))):
            due = rank == 0 and time.monotonic() - saved > max(
                checkpoint_seconds, bool(checkpoint_seconds) * SAVING_SHARE * to_save
            )
            loss, (due, stop) = train_step(model, optimizers, part, (due, stopped()))
            state["step"] += 1
            state["loss"] += loss
            tokens += part.tokens
            progress(
                {"step": state["step"], "steps": config.epochs * len(batches), "tokens": part.tokens, "loss": loss}
            )
            if state["step"] % len(batches) == 0:
                break  # what ends the epoch must be in the checkpoint too
            if due or stop:
                to_save, saved = save()
            if stop:
                raise Interrupted(
                    f"interrupted after step {state['step']}; saved. Go on with: {_resume_command(folder.out)}"
                )
        metrics: dict[str, Any] = {
            "epoch": epoch,
            "step": state["step"],
            "loss": state["loss"] / len(batches),
            "tokens_per_s": tokens / (time.monotonic() - started),
        }
        state["loss"] = 0.0
        optimizers.tables.flush()
        last_epoch = epoch + 1 >= config.epochs
        if (epoch + 1) % config.valid_every == 0 or last_epoch:
            metrics["valid"] = validate(cast(Any, model), dataset)
            if is_best(state, metrics["valid"]["ndcg@10"], epoch):
                of_best = {"epoch": epoch, "step": state["step"], **metrics["valid"]}
                folder.save("best", dict(model.model.state_dict()), of_best)
        state["done"] = last_epoch or state["since_best"] >= config.patience
        state["metrics"].append(metrics)
        to_save, saved = save()
        if rank == 0:
            write_metrics(folder.out, state["metrics"])
        progress(metrics | {"best_epoch": state["best_epoch"]})
        if stop and not state["done"]:
            raise Interrupted(
                f"interrupted after step {state['step']}; saved. Go on with: {_resume_command(folder.out)}"
            )


def _finish(model: Sharded, dataset: Dataset, folder: Checkpoints) -> None:
    """The best weights, calibrated as cafe.train does it; the plain run; the plots."""
    state = folder.load("best", model.model.load_state_dict)
    if calibrate(cast(Any, model), dataset, state):
        folder.save("best", dict(model.model.state_dict()), state)
    if dist.get_rank() == 0:
        export(folder.out)
        plot_curve(folder.out)
        lengths = dataset.train().lengths
        plot_masks(model.model, lengths[lengths >= 2], folder.out)
    folder.barrier()


@contextmanager
def _processes(device: str) -> Iterator[tuple[torch.device, Any]]:
    """Joins the ranks, unless the caller did; this rank's device, and a group of all ranks that waits for work that takes long."""
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    ours = not dist.is_initialized()
    if ours:
        backend = "nccl" if where.type == "cuda" else "gloo"
        store, rank, ranks = next(dist.rendezvous("env://", timeout=PATIENCE))
        # torchrun keeps its store when it starts the ranks again, and gloo would find the addresses of those that are gone
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        store.set(f"rank {rank}", "has read its data")  # which takes some longer
        store.wait([f"rank {one}" for one in range(ranks)], PATIENCE)
        timeout = timedelta(seconds=SILENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    yield where, dist.new_group(backend="gloo", timeout=PATIENCE)
    if ours:
        dist.destroy_process_group()


def _everyones(value: Any, group: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _agree(facts: dict[str, Any], group: Any) -> None:
    """Refuses ranks that would train something else than the first."""
    expected, *others = _everyones(facts, group)
    for rank, found in enumerate(others, 1):
        for name in expected:
            if found[name] != expected[name]:
                raise ValueError(
                    f"ranks differ: {name} is {expected[name]!r} on rank 0 and {found[name]!r} on rank {rank}; "
                    "start all with the same options, data and packages"
                )


def _check_shared(out: Path, group: Any) -> None:
    """Do all ranks see what the first, which has locked the folder, writes to its lock file?"""
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0, group=group)
    file = out / ".lock"
    if dist.get_rank() == 0:
        file.write_text(token[0])
    dist.barrier(group=group)
    seen = _everyones(file.is_file() and file.read_text() == token[0], group)
    if not all(seen):
        raise ValueError(
            f"rank {seen.index(False)} does not see what rank 0 writes to {out}: give a folder that all ranks share, by --out"
        )


@contextmanager
def _lost_ranks(out: Path) -> Iterator[None]:
    """Says what the errors of torch.distributed mean: a rank that dies closes its connections, one that hangs runs out of time."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not (isinstance(error, dist.DistError) or re.search("gloo|nccl|connection|timed out|timeout", text, re.I)):
            raise
        rank, ranks = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        if (out / "last.json").exists():
            how = f"All that was saved is there: go on from step {read_index(out, 'last')['step']} with: {_resume_command(out)}"
        else:
            how = "Nothing was saved yet: start again as before"
        raise RankLost(
            f"rank {rank} of {ranks} lost another, which died (then it says why, or was killed) or was silent for {SILENCE} s "
            f"({text[:200]}). {how}"
        ) from None


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, and torchrun's SIGTERM, set a flag that all ranks read in the next step. If a rank is gone, that step fails."""
    pressed: list[int] = []
    former: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, lambda number, frame: pressed.append(number))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield lambda: bool(pressed)
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)


def _resume_command(out: Path) -> str:
    local = os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size()
    return f"torchrun --nproc-per-node {local} -m cafe.distributed --resume --out {shlex.quote(str(out))}"


def main() -> None:
    """`cafe train` on this rank, or with --export the last step to a plain run."""
    from cafe import cli

    if "--export" in sys.argv:
        parser = argparse.ArgumentParser("python -m cafe.distributed", description=export.__doc__)
        parser.add_argument("--export", action="store_true", required=True)
        parser.add_argument("--out", required=True, help="Run folder.")
        try:
            return print(export(parser.parse_args().out))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    if int(os.environ.get("RANK", 0)) > 0:  # one rank speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
    elif not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() and "--help" not in sys.argv:
        sys.exit("error: cafe.distributed runs under torchrun: torchrun --nproc-per-node 2 -m cafe.distributed ...")
    sys.argv = ["cafe", "train", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()
