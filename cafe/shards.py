"""The checkpoints of cafe.distributed, `last` and `best`: a file for each rank's rows of the item table and one for what all ranks have.

    last.json, best.json                        the files of the checkpoint, and which rows each has
    shards/NAME-STEP-TOKEN-rows-FIRST.safetensors     rows from FIRST on of the table and of its optimizer's state
    shards/NAME-STEP-TOKEN-all.safetensors            the rest, and the progress

The files are written first, under names that never were, and then NAME.json, so that a kill at any moment leaves the former checkpoint
or the new one; files that no NAME.json names are removed. Another number of ranks reads them as well.
"""

import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cafe.checkpoint import load_checkpoint, restore_checked, save_checkpoint
from cafe.data.folders import read_sealed, seal, write_atomically

FORMAT, VERSION = "cafe-shards", 2
TABLE = "item_embedding"
# Of a checkpoint, what has a row for each item; all ranks have the rest.
BY_ROW = {TABLE, f"model.{TABLE}", *(f"optimizer.tables.0.{name}" for name in ("exp_avg", "exp_avg_sq", "last_step"))}
FILE = r"(last|best)-\d+-[0-9a-f]+-(all|rows-\d+)\.safetensors"


class Checkpoints:
    """Those of the run folder `out`. save and load are called by all ranks together.

    Args:
        run_hash: of cafe.runs.hash_of.
        table: a ShardedTable.
        group: of all ranks, for waiting while files are written.
    """

    def __init__(self, out: Path, run_hash: str, table: Any, group: Any) -> None:
        self.out, self.run_hash, self.table, self.group = out, run_hash, table, group

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def save(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token, src=0, group=self.group)
        state, step, table = state | {"run": self.run_hash}, state["step"], self.table
        block = -(-table.num_rows // dist.get_world_size())
        stem = f"{name}-{step}-{token[0]}"
        shards = [
            [f"{stem}-rows-{first}.safetensors", first, min(first + block, table.num_rows)]
            for first in range(0, table.num_rows, block)
        ]
        folder = _folder(self.out)
        folder.mkdir(exist_ok=True)
        file, *rows = shards[dist.get_rank()]
        mine = {key: tensor for key, tensor in tensors.items() if key in BY_ROW}
        save_checkpoint(folder / str(file), mine, {"run": self.run_hash, "step": step, "rows": rows})
        common = f"{stem}-all.safetensors"
        if dist.get_rank() == 0:
            save_checkpoint(folder / common, {key: t for key, t in tensors.items() if key not in BY_ROW}, state)
        self.barrier()
        if dist.get_rank() == 0:
            meta = {"format": FORMAT, "version": VERSION, "step": step, "rows": table.num_rows, "common": common}
            write_atomically({self.out / f"{name}.json": [seal(meta | {"shards": shards})]})
            named = [read_index(self.out, one) for one in ("last", "best") if (self.out / f"{one}.json").exists()]
            kept = {file for one in named for file in (one["common"], *(shard[0] for shard in one["shards"]))}
            for entry in folder.iterdir():
                if entry.name not in kept and re.fullmatch(rf"{FILE}|\.{FILE}\.tmp", entry.name):
                    entry.unlink()
        self.barrier()

    def load(self, name: str, restore: Callable[[dict[str, Tensor]], Any]) -> dict[str, Any]:
        """Passes what was saved, of the table this rank's rows, to `restore`, whatever the number of ranks was; returns the state."""
        index, folder = read_index(self.out, name), _folder(self.out)
        tensors, state = load_checkpoint(folder / index["common"])
        parts: dict[str, list[Tensor]] = {}
        for file, first, stop in index["shards"]:
            start, end = max(first, self.table.first), min(stop, self.table.stop)
            if start < end:
                for key, tensor in _rows(folder / file, self.run_hash, index["step"], first, stop).items():
                    parts.setdefault(key, []).append(tensor[start - first : end - first].clone())
        fits = state.get("run") == self.run_hash and index["rows"] == self.table.num_rows
        joined = lambda whole: restore(whole | {key: torch.cat(some) for key, some in parts.items()})  # noqa: E731
        restore_checked(self.out / f"{name}.json", fits, joined, tensors)
        return state


def read_index(out: Path, name: str) -> dict[str, Any]:
    """NAME.json of a run folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, names files elsewhere, or rows that are not 0 ... `rows` - 1.
    """
    try:
        index = read_sealed(out / f"{name}.json", FORMAT, VERSION, "train again")
    except FileNotFoundError:
        raise FileNotFoundError(f"{out} has no {name}.json: nothing was saved there by cafe.distributed") from None
    if not _is_index(index):
        raise ValueError(f"{out / name}.json names no checkpoint's files and rows: restore it, or train again")
    return index


def _is_index(index: dict[str, Any]) -> bool:
    shards = index.get("shards")
    if not isinstance(shards, list) or not shards or any(not isinstance(x, list) or len(x) != 3 for x in shards):
        return False
    files, firsts, stops = zip(*shards, strict=True)
    return (
        all(type(x) is int for x in (index.get("step"), index.get("rows"), *firsts, *stops))
        and all(isinstance(file, str) and re.fullmatch(FILE, file) for file in (index.get("common"), *files))
        and [*firsts, index["rows"]] == [0, *stops]
        and all(first < stop for first, stop in zip(firsts, stops, strict=True))
    )


def _folder(out: Path) -> Path:
    folder = out / "shards"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{folder} is not a folder, but a link or a file: remove it, and restore the run or train again"
        )
    return folder


def _rows(path: Path, run_hash: Any, step: int, first: int, stop: int) -> dict[str, Tensor]:
    """A rank's file, which must be of this run and step, and of these rows."""
    tensors, state = load_checkpoint(path)
    expected = {"run": run_hash, "step": step, "rows": [first, stop]}
    if state != expected or any(tensor.shape[:1] != (stop - first,) for tensor in tensors.values()):
        raise ValueError(
            f"{path} is of another run, step or part of the table than its place: restore it or train again"
        )
    return tensors


def export(run: str | Path) -> Path:
    """Writes best.safetensors, which `cafe evaluate` and `cafe recommend` read, from the best checkpoint of a run folder. One process
    does it, and has the shard of one rank in memory at a time.

    Example:
        >>> export("runs/cafe")  # doctest: +SKIP
        PosixPath('runs/cafe/best.safetensors')
    """
    run = Path(run)
    index, folder = read_index(run, "best"), _folder(run)
    tensors, state = load_checkpoint(folder / index["common"])
    with tempfile.TemporaryFile(dir=folder) as scratch:
        table: Any = None
        for file, first, stop in index["shards"]:
            rows = _rows(folder / file, state.get("run"), index["step"], first, stop).get(TABLE, torch.empty(0))
            width = rows.shape[-1] if table is None else table.shape[1]
            if rows.dtype != torch.float32 or rows.shape != (stop - first, width):
                raise ValueError(f"{folder / file} has no rows of the item table ({TABLE}): restore it or train again")
            if table is None:
                table = np.memmap(scratch, np.float32, "w+", shape=(index["rows"], width))
            table[first:stop] = rows
        save_checkpoint(run / "best.safetensors", tensors | {TABLE: torch.from_numpy(table)}, state)
    return run / "best.safetensors"
