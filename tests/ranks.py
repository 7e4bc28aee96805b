"""Runs a function on several gloo processes: `run(ranks, job, *arguments)` calls it on each, and gives what rank 0 returns.

The processes are forked from a server that has imported TorchRec, which takes some seconds, once. The jobs are here, as a process
must be able to import them.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import cafe.distributed
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.evaluate import evaluate
from cafe.sharding import ShardedIndex, gather

SECONDS = 240  # for a job


def run(ranks: int, job: Any, *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "torchrec.distributed.embedding", "matplotlib.pyplot"])
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, ranks, f"{folder}/store", send, job, arguments), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        answers = [pickle.loads(receive.recv()) if receive.poll(SECONDS) else (False, "silent") for receive, _ in pipes]
        for process in processes:
            process.join(10)
            process.kill()
    failed = [f"rank {rank}: {answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return answers[0][1]


def _rank(rank: int, ranks: int, store: str, send: Any, job: Any, arguments: Any) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        answer = True, job(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    send.send(pickle.dumps(answer))  # torch would share the tensors' memory, which ends with this process
    dist.barrier()


def fit(config: Config, data: Path, out: Path, stop_after: int = 0, fail_at: int = 0, **options: Any) -> Any:
    """Trains; rank 0's losses, and what stopped it. stop_after: a SIGTERM on rank 0 after that step; fail_at: that barrier fails."""
    losses: list[float] = []

    def progress(event: dict[str, Any]) -> None:
        if "tokens" in event:
            losses.append(event["loss"])
            if event["step"] == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    barriers = 0

    def barrier(group: Any) -> None:
        nonlocal barriers
        barriers += 1
        if barriers == fail_at:
            raise OSError("pulled the plug")
        dist_barrier(group=group)

    dist_barrier, dist.barrier = dist.barrier, barrier
    stopped = ""
    try:
        cafe.distributed.fit(config, Dataset.load(data), out, data=data, progress=progress, **options)
    except (cafe.distributed.Interrupted, OSError, ValueError) as error:
        stopped = str(error)
    finally:
        dist.barrier = dist_barrier
    return losses, stopped


def fit_with(config: Config, data: Path, out: Path, options: dict[str, Any]) -> Any:
    return fit(config, data, out, **options)


def resumed(config: Config, data: Path, out: Path) -> Any:
    return fit(config, data, out, resume=True)


def differ(config: Config, data: Path, out: Path, other: Config, other_out: Path) -> Any:
    """The last rank has another configuration and folder."""
    mine = (other, other_out) if dist.get_rank() == dist.get_world_size() - 1 else (config, out)
    return fit(mine[0], data, mine[1])


def checkpoints(config: Config, data: Path, out: Path) -> Any:
    dataset = Dataset.load(data)
    model = cafe.distributed.build(config, dataset, torch.device("cpu"))
    run_hash = cafe.distributed.hash_of(cafe.distributed.asdict(config), dataset.fingerprint)
    return model, dataset, cafe.distributed.Checkpoints(out, run_hash, model.table, dist.group.WORLD)


def save_best(config: Config, data: Path, out: Path, value: float, fail: bool) -> Any:
    """Saves a table that is `value` everywhere; fail: all ranks end when their files are written and not named yet."""
    model, _, folder = checkpoints(config, data, out)
    torch.nn.init.constant_(model.table.shard, value)
    if fail:
        folder.barrier = lambda: sys.exit("pulled the plug")
    try:
        folder.save("best", dict(model.model.state_dict()), {"step": 5})
    except SystemExit:
        return "cut"


def load_best(config: Config, data: Path, out: Path) -> Any:
    """The table that was saved, as the ranks have it together."""
    model, _, folder = checkpoints(config, data, out)
    folder.load("best", model.model.load_state_dict)
    rows, block = model.table.shard.detach(), -(-model.table.num_rows // dist.get_world_size())
    return gather(torch.nn.functional.pad(rows, (0, 0, 0, block - len(rows))))[: model.table.num_rows]


def replicas_differ(config: Config, data: Path, steps: int) -> list[str]:
    """The names of what should be the same on all ranks after some steps, and is not; and whether dropout is the same."""
    dataset = Dataset.load(data)
    model = cafe.distributed.build(config, dataset, torch.device("cpu")).train()
    batches = cafe.distributed.Batches(config, dataset)
    optimizers = cafe.distributed.make_optimizers(model.model)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        part = cafe.distributed.make_part(batches, batches.order(0)[: config.batch_size], step, rank, ranks)
        cafe.distributed.train_step(model, optimizers, part)
    everyones = {
        name: gather(p.detach()[None]) for name, p in model.model.named_parameters() if name != "item_embedding"
    }
    return [name for name, values in everyones.items() if not (values == values[0]).all()]


def evaluated(config: Config, data: Path, run: Path, protocol: str) -> Any:
    """The ranks of the test answers by a sharded model, in the state of a run folder's best checkpoint."""
    model, dataset, folder = checkpoints(config, data, run)
    folder.load("best", model.model.load_state_dict)
    result = evaluate(model, dataset, "test", protocol, batch_size=50)
    return result.greater, result.equal


def top_k(keys: torch.Tensor, intent: torch.Tensor, query: tuple[Any, ...], k: int, answers: torch.Tensor) -> Any:
    """search and count_above of a ShardedIndex over `keys`."""
    user, intent_scores, join, exclude = query
    rank, block = dist.get_rank(), -(-len(keys) // dist.get_world_size())
    mine = slice(rank * block, (rank + 1) * block)
    room = torch.nn.functional.pad(keys[mine], (0, 1, 0, 1), value=torch.nan)
    several = int(intent.max()) + 1
    index = ShardedIndex(room, intent[mine], several, rank * block, lambda ids: (keys[ids], intent[ids]))
    found = index.search(user, k, intent_scores, join=join, exclude=exclude)
    counts = index.count_above(user, answers, intent_scores, join=join, exclude=exclude)
    return found.items, found.scores, counts


def many_top_k(cases: list[Any]) -> list[Any]:
    return [top_k(*case) for case in cases]


def raw_rows(rows: int, dim: int, asked: list[np.ndarray]) -> Any:
    """What TorchRec brings and takes back: row v of the table is v everywhere, rank r asks for asked[r] and returns r + 1 as gradient."""
    table = cafe.distributed.ShardedTable(rows, dim, torch.device("cpu"))
    with torch.no_grad():
        table.shard.copy_(torch.arange(table.first, table.stop).float()[:, None].expand(-1, dim))
    rank = dist.get_rank()
    ids = torch.from_numpy(asked[rank])
    fetched = table.fetch(ids)
    ok = bool((fetched == ids[:, None]).all())
    fetched.backward(torch.full_like(fetched, rank + 1.0))
    table.gather_gradient()
    grad = gather(
        torch.nn.functional.pad(
            table.shard.grad.to_dense(), (0, 0, 0, -(-rows // dist.get_world_size()) - len(table.shard))
        )
    )
    return ok, grad[:rows]
