"""A sequential recommender from the ops alone: your model, your loop, no trainer.

    python examples/own_loop.py FILE [--epochs 20] [--help]        FILE: user,item,timestamp, as CSV, plain or .gz

One causal block on packed histories (DistanceMaskedAttention), a softmax over the next item and shared negatives drawn by popularity^0.5
(AliasSampler, sampled_softmax), a table of which each step moves the rows it read (RowSparseAdam), and exact search (TopKIndex). Every
user's last item is left out: HR@10 of it among the whole catalog less what the user had.
"""

import argparse
import csv
import gzip
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cafe_kernels import AliasSampler, DistanceMaskedAttention, RowSparseAdam, TopKIndex, sampled_softmax


class Encoder(nn.Module):
    def __init__(self, items: int, dim: int, length: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Parameter(0.02 * torch.randn(items, dim))
        self.attention = DistanceMaskedAttention(dim, 1, max_distance=length, dropout=dropout)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, items: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Items (T,) of packed histories -> (T, dim): what each history is searched by after each of its items."""
        x = self.dropout(nn.functional.embedding(items, self.items, sparse=True) * self.items.shape[1] ** 0.5)
        x = x + self.dropout(self.attention.packed(self.norms[0](x), cu_seqlens))
        return self.norms[2](x + self.dropout(self.feed_forward(self.norms[1](x))))


def seconds(text: str) -> float:
    """A timestamp, a number or an ISO 8601 date (without a zone: UTC)."""
    try:
        return float(text)
    except ValueError:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def read(path: Path) -> tuple[list[str], list[np.ndarray]]:
    """The items' ids, and every user's item numbers in time order."""
    number: dict[str, int] = {}
    events = defaultdict(list)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for row in csv.DictReader(file):
            events[row["user"]].append((seconds(row["timestamp"]), number.setdefault(row["item"], len(number))))
    histories = [np.array([item for _, item in sorted(rows, key=lambda row: row[0])]) for rows in events.values()]
    return list(number), [history for history in histories if len(history) > 2]


def pack(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows one after another, and where each begins."""
    return torch.from_numpy(np.concatenate(rows)), torch.tensor([0, *np.cumsum([len(row) for row in rows])]).int()


def train(model, rows, tables, others, sampler, options, epoch) -> float:
    """One epoch; returns the mean loss."""
    model.train()
    total = 0.0
    batches = torch.randperm(len(rows)).split(options.batch_size)
    for step, batch in enumerate(batches, epoch * len(batches)):
        newest = [rows[row][-options.length - 1 :] for row in batch]
        items, cu_seqlens = pack([row[:-1] for row in newest])
        positives, _ = pack([row[1:] for row in newest])
        drawn = sampler.sample(options.negatives, seed=options.seed, offset=step * options.negatives)
        negatives = torch.from_numpy(drawn).long()
        tables.catch_up(model.items, torch.cat([items, positives, negatives]))  # before they are read
        state = model(items, cu_seqlens)
        log_q = [torch.from_numpy(sampler.log_prob(x) + np.log(len(negatives))).float() for x in (positives, negatives)]
        loss = sampled_softmax(state, model.items, positives, negatives, log_q=tuple(log_q), sparse_grad=True)
        for optimizer in (tables, others):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (tables, others):
            optimizer.step()
        total += loss.item() / len(batches)
    tables.flush()  # now anybody may read the table
    return total


@torch.no_grad()
def recommend(model: Encoder, index: TopKIndex, rows: list[np.ndarray], length: int, k: int) -> Tensor:
    """The k best items for each history that are not in it, (B, k)."""
    model.eval()
    items, cu_seqlens = pack([row[-length:] for row in rows])
    had, indptr = pack(rows)
    return index.search(model(items, cu_seqlens)[cu_seqlens[1:].long() - 1], k, exclude=(indptr, had)).items


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    sizes = {"epochs": 20, "batch_size": 128, "dim": 64, "length": 50, "negatives": 512, "seed": 0}
    for name, default in (sizes | {"lr": 1e-3, "dropout": 0.4}).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, help=f"{default} by default")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"{options.file}: no such file; give one with the columns user, item, timestamp")
    ids, histories = read(options.file)
    if not histories:
        parser.error(f"{options.file}: no user has three interactions; give more rows of user, item, timestamp")
    torch.manual_seed(options.seed)
    model = Encoder(len(ids), options.dim, options.length, options.dropout)
    tables = RowSparseAdam([model.items], lr=options.lr, mode="exact")
    others = torch.optim.AdamW([p for p in model.parameters() if p is not model.items], lr=options.lr)
    known, answers = [row[:-1] for row in histories], torch.tensor([row[-1] for row in histories])
    sampler = AliasSampler(np.bincount(np.concatenate(known), minlength=len(ids)), alpha=0.5)
    for epoch in range(options.epochs):
        loss = train(model, known, tables, others, sampler, options, epoch)
        found = recommend(model, TopKIndex(model.items), known, options.length, k=10)
        hits = float((found == answers[:, None]).any(1).float().mean())
        print(f"epoch {epoch + 1}  loss {loss:.3f}  HR@10 {hits:.4f}")
    print("for the first user:", ", ".join(ids[item] for item in found[0]))


if __name__ == "__main__":
    main()
