"""A plain padded SASRec on nn.MultiheadAttention, and the same with one line changed: the learned distance mask.

    python examples/drop_in.py [FOLDER with interactions.csv.gz: user,item,timestamp] [--epochs 20] [--help]

Both train in turn, epoch by epoch (binary cross entropy, one uniform negative, Adam). Every user's last item is left out, the one
before it validates: NDCG@10 and HR@10 among the whole catalog less the user's earlier items, at the best epoch.
"""

import argparse
import csv
import gzip
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cafe_kernels import DistanceMaskedAttention

# The one line that changes.
ATTENTION = {
    "nn.MultiheadAttention": lambda dim, heads, length, dropout: nn.MultiheadAttention(dim, heads, dropout, batch_first=True),
    "DistanceMaskedAttention": lambda dim, heads, length, dropout: DistanceMaskedAttention(dim, heads, length, dropout, batch_first=True),
}  # fmt: skip


class SASRec(nn.Module):
    """Kang & McAuley 2018. Items count from 1, padding is 0 and comes after a history's items."""

    def __init__(
        self, attention: str, items: int, dim: int, heads: int, layers: int, length: int, dropout: float
    ) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, dim, padding_idx=0)
        self.position = nn.Embedding(length, dim)
        self.attention = nn.ModuleList(ATTENTION[attention](dim, heads, length, dropout) for _ in range(layers))
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim), nn.Dropout(dropout))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers + 1))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.item.weight[1:].detach(), std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, items: Tensor) -> Tensor:
        """items (B, N) -> (B, N, dim)."""
        padding, length = items == 0, items.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.item(items) * self.item.embedding_dim**0.5 + self.position.weight[:length]
        x = self.dropout(x).masked_fill(padding[..., None], 0)
        for layer, attention in enumerate(self.attention):
            y = self.norms[2 * layer](x)
            y, _ = attention(y, y, y, key_padding_mask=padding, attn_mask=causal, need_weights=False)
            x = x + self.dropout(y)
            x = x + self.feed_forward[layer](self.norms[2 * layer + 1](x))
        return self.norms[-1](x)


def read(folder: Path) -> list[list[int]]:
    """Every user's items in time order, numbered from 1."""
    number: dict[str, int] = {}
    events = defaultdict(list)
    with gzip.open(folder / "interactions.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            item = number.setdefault(row["item"], len(number) + 1)
            events[row["user"]].append((int(row["timestamp"]), item))
    return [[item for _, item in sorted(rows, key=lambda row: row[0])] for rows in events.values() if len(rows) > 3]


def pad(rows: list[list[int]], length: int) -> Tensor:
    return torch.tensor([row[-length:] + [0] * (length - len(row)) for row in rows])


def train(model: SASRec, rows: list[list[int]], length: int, batch_size: int, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    sequences = pad([row[:-2] for row in rows], length + 1)
    for batch in sequences[torch.randperm(len(sequences))].split(batch_size):
        items, positive = batch[:, :-1], batch[:, 1:]
        items = items.masked_fill(positive == 0, 0)
        negative = torch.randint(1, model.item.num_embeddings, positive.shape)
        state, real = model(items), positive > 0
        logits = torch.stack([(state * model.item(target)).sum(-1)[real] for target in (positive, negative)])
        loss = binary_cross_entropy_with_logits(logits, torch.tensor([[1.0], [0.0]]).expand_as(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def validate(model: SASRec, rows: list[list[int]], length: int) -> tuple[float, float]:
    """NDCG@10 and HR@10 of the last item but one."""
    model.eval()
    ndcg = hits = 0.0
    for first in range(0, len(rows), 256):
        batch = rows[first : first + 256]
        items = pad([row[:-2] for row in batch], length)
        state = model(items)[torch.arange(len(batch)), (items > 0).sum(1) - 1]
        scores = state @ model.item.weight.T
        answer = torch.tensor([row[-2] for row in batch])
        own = scores.gather(1, answer[:, None])
        scores[:, 0] = -torch.inf
        for user, row in enumerate(batch):
            scores[user, row[:-2]] = -torch.inf
        rank = (scores > own).sum(1)
        ndcg += float(((rank < 10) / (rank + 2).log2()).sum())
        hits += float((rank < 10).sum())
    return ndcg / len(rows), hits / len(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beauty = Path(__file__).parent / "../../shared/data/beauty-sparse"
    parser.add_argument("folder", nargs="?", type=Path, default=beauty)
    for name, default in (
        ("epochs", 20),
        ("batch_size", 128),
        ("dim", 64),
        ("heads", 2),
        ("layers", 2),
        ("length", 50),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default} by default")
    parser.add_argument("--dropout", type=float, default=0.3, help="0.3 by default")
    parser.add_argument("--lr", type=float, default=1e-3, help="0.001 by default")
    options = parser.parse_args(arguments)
    if not (options.folder / "interactions.csv.gz").exists():
        parser.error(f"no interactions.csv.gz in {options.folder}: give a folder that has one (user,item,timestamp)")

    rows = read(options.folder)
    items = max(item for row in rows for item in row)
    models, optimizers = {}, {}
    for name in ATTENTION:
        torch.manual_seed(options.seed)
        sizes = (options.dim, options.heads, options.layers, options.length, options.dropout)
        models[name] = SASRec(name, items, *sizes)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=options.lr)
    seconds, metrics = {name: [] for name in models}, {name: [] for name in models}
    for epoch in range(options.epochs):
        for name, model in models.items():
            torch.manual_seed(1000 * options.seed + epoch)
            started = time.perf_counter()
            train(model, rows, options.length, options.batch_size, optimizers[name])
            seconds[name].append(time.perf_counter() - started)
            metrics[name].append(validate(model, rows, options.length))
    print(f"{len(rows):,} users, {items:,} items, {options.epochs} epochs of {options.folder}")
    for name in models:
        ndcg, hits = max(metrics[name])
        epoch = metrics[name].index((ndcg, hits)) + 1
        print(
            f"{name:23} validation NDCG@10 {ndcg:.4f}  HR@10 {hits:.4f}  (epoch {epoch})  "
            f"{statistics.median(seconds[name]):.2f} s an epoch"
        )


if __name__ == "__main__":
    main()
