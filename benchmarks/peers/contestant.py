"""What every contestant of end_to_end.py does, whatever library it trains with: it waits for its turn, trains an epoch, ranks.

A contestant is a process of its own. It reads the training histories of data.npz and says what it did by one line of JSON an epoch;
end_to_end.py tells it to go on by a line. It never sees the answers: it hands over the ten best items of every user, of which
end_to_end.py makes NDCG@10 in the same way for all. Clocks and the peak of memory run while it trains, and stand still while it
ranks or waits. Imports numpy and torch only, which every environment has.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

USERS_AT_ONCE = 128
TURNS_A_FIT = 8
Scores = Callable[[np.ndarray], Tensor]  # users of Data -> scores (users, num_items) of what each takes next


class Data:
    """The common training data: `history(user)` is all that may be seen of it, items numbered 0 to num_items - 1.

    users: int64, those that are ranked, as rows of the training set; the others are only trained on.
    """

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        self.num_items = int(arrays["num_items"])
        self.users: np.ndarray = arrays["users"]
        self.indptr: np.ndarray = arrays["indptr"]
        self.items: np.ndarray = arrays["items"]
        self.excluded_indptr: np.ndarray = arrays["excluded_indptr"]  # of `users`, in their order
        self.excluded: np.ndarray = arrays["excluded"]

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def history(self, user: int) -> np.ndarray:
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def padded(self, users: np.ndarray, length: int) -> Tensor:
        """int64 (users, length): each one's newest items plus 1, 0 on the left."""
        rows = np.zeros((len(users), length), np.int64)
        for row, user in zip(rows, users, strict=True):
            newest = self.history(user)[-length:]
            row[length - len(newest) :] = newest + 1
        return torch.from_numpy(rows)


def ten_best(data: Data, scores: Scores) -> np.ndarray:
    """int64 (users, 10): the items of each of `data.users` that score best, without the excluded ones.

    Raises:
        ValueError: a score is NaN.
    """
    parts = []
    with torch.inference_mode():
        for start in range(0, len(data.users), USERS_AT_ONCE):
            stop = min(start + USERS_AT_ONCE, len(data.users))
            values = scores(data.users[start:stop]).float().clone()
            if values.isnan().any():
                raise ValueError("NaN among the scores")
            indptr = data.excluded_indptr[start : stop + 1]
            rows = np.repeat(np.arange(stop - start), np.diff(indptr))
            values[torch.from_numpy(rows), torch.from_numpy(data.excluded[indptr[0] : indptr[-1]])] = -torch.inf
            parts.append(values.topk(10).indices)
    return torch.cat(parts).numpy()


class Contestant:
    """The turns of one process: `settings` and `data` are what it was started with; call `start()` when all is set up, and
    `epoch_done` after each epoch, until it says that it is over."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("settings", type=json.loads)
        parser.add_argument("data", type=Path)
        parser.add_argument("top", type=Path, help="where the lists of the ten best go, .npy")
        given = parser.parse_args()
        # What libraries print goes to stderr.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.settings: dict[str, Any] = given.settings
        self.data = Data(given.data)
        self._top = given.top
        self._wall, self._cpu, self._peak, self._added = 0.0, 0.0, 0, (0.0, 0.0)
        self._epoch, self._turn = 0, 0
        torch.set_num_threads(self.settings["threads"])
        torch.manual_seed(self.settings["seed"])

    def start(self, versions: dict[str, str] | None = None) -> None:
        self._resident = _memory("VmRSS")
        self._say({"ready": True, "versions": {"torch": torch.__version__, **(versions or {})}})
        self._wait()

    def epoch_done(self, scores: Scores, extra: Callable[[], Any] | None = None) -> bool:
        """Reports the epoch that just ended; False when it was the last.

        `extra`: what has to be done once when training stops here, before one can rank. Its time is added to this report's alone; where
        it is not done at every report, as that takes long, each report has the time that it took last.
        """
        self._stop()
        self._epoch += 1
        if self._epoch % self.settings.get("epochs_a_turn", 1):
            self._began = time.perf_counter(), time.process_time()
            return True
        if extra is not None and self._turn % TURNS_A_FIT == 0:
            began = time.perf_counter(), time.process_time()
            extra()
            self._added = time.perf_counter() - began[0], time.process_time() - began[1]
        self._turn += 1
        np.save(self._top, ten_best(self.data, scores))
        self._say(
            {
                "epoch": self._epoch,
                "wall_seconds": self._wall + self._added[0],
                "cpu_seconds": self._cpu + self._added[1],
                "peak_bytes": self._peak,
                "peak_beyond_start_bytes": self._peak - self._resident,
            }
        )
        return self._wait()

    def _say(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def _wait(self) -> bool:
        go = sys.stdin.readline().strip() == "go"
        _reset_peak()
        self._began = time.perf_counter(), time.process_time()
        return go

    def _stop(self) -> None:
        self._wall += time.perf_counter() - self._began[0]
        self._cpu += time.process_time() - self._began[1]
        self._peak = max(self._peak, _memory("VmHWM"))


def _memory(key: str) -> int:
    """Bytes, of Linux's /proc: VmRSS is resident now, VmHWM the most since the last `_reset_peak`."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
