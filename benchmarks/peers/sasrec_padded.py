"""SASRec as public PyTorch code has it: padded histories, nn.MultiheadAttention, Conv1d feed-forward, one negative drawn in Python.

Written after the habits of the well-known repositories (pre-norm form, left padding with item 0, a causal mask for the attention,
padded places set to zero after every part, BCE on one uniform negative a position, torch.optim.Adam), to be timed beside cafe's.
Where those habits differ it takes the faster one: attention returns no weights, so PyTorch uses its fused attention.
"""

import random

import numpy as np
import torch
from torch import Tensor, nn

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models import Scores


class FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(dim, dim, kernel_size=1), nn.Conv1d(dim, dim, kernel_size=1)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(-1, -2)
        x = self.dropout2(self.conv2(torch.relu(self.dropout1(self.conv1(x)))))
        return x.transpose(-1, -2)


class PaddedSASRec(nn.Module):
    """`config`: of cafe's SASRec, of which it reads dim, heads, layers, max_len, dropout and init_std."""

    def __init__(self, config: Config, num_items: int) -> None:
        super().__init__()
        d = config.dim
        self.config = config
        self.item_embedding = nn.Embedding(num_items + 1, d, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_len, d)
        nn.init.normal_(self.item_embedding.weight, std=config.init_std)
        nn.init.normal_(self.position_embedding.weight, std=config.init_std)
        with torch.no_grad():
            self.item_embedding.weight[0] = 0
        self.dropout = nn.Dropout(config.dropout)
        self.norms1, self.norms2 = (
            nn.ModuleList(nn.LayerNorm(d, eps=1e-8) for _ in range(config.layers)) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(d, config.heads, config.dropout, batch_first=True) for _ in range(config.layers)
        )
        self.feed_forwards = nn.ModuleList(FeedForward(d, config.dropout) for _ in range(config.layers))
        self.last_norm = nn.LayerNorm(d, eps=1e-8)

    def encode(self, sequences: Tensor) -> Tensor:
        """sequences: int64 (B, n), 0 where padded; returns (B, n, d)."""
        length = sequences.shape[1]
        x = self.item_embedding(sequences) * self.config.dim**0.5
        x = self.dropout(x + self.position_embedding(torch.arange(length, device=x.device)))
        keep = (sequences != 0).unsqueeze(-1)
        x = x * keep
        mask = ~torch.tril(torch.ones(length, length, dtype=torch.bool, device=x.device))
        for norm1, attention, norm2, feed_forward in zip(
            self.norms1, self.attentions, self.norms2, self.feed_forwards, strict=True
        ):
            query = norm1(x)
            attended, _ = attention(query, query, query, attn_mask=mask, need_weights=False)
            x = (x + self.dropout(attended)) * keep
            x = (x + feed_forward(norm2(x))) * keep
        return self.last_norm(x)

    def forward(self, sequences: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, n) of the positives and negatives."""
        states = self.encode(sequences)
        positive_logits = (states * self.item_embedding(positives)).sum(-1)
        negative_logits = (states * self.item_embedding(negatives)).sum(-1)
        return positive_logits, negative_logits

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
    ) -> Scores:
        """For cafe.evaluate: item logits after each packed history."""
        histories = items.split(cu_seqlens.diff().tolist())
        padded = torch.zeros(len(histories), self.config.max_len, dtype=torch.long)
        for row, history in zip(padded, histories, strict=True):
            row[len(row) - len(history) :] = history + 1
        states = self.encode(padded)[:, -1]
        if candidates is None:
            return Scores(states @ self.item_embedding.weight[1:].T, None)
        return Scores((self.item_embedding(candidates + 1) @ states.unsqueeze(-1)).squeeze(-1), None)

    def join(
        self, item_logits: Tensor, intent_logits: Tensor | None, weight: float | None = None, protocol: str = "full"
    ) -> Tensor:
        return item_logits


class PaddedTrainer:
    """Model, optimizer and batches; `step(users)` trains on the training histories of the users (rows of the dataset)."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        self.num_items, self.max_len = dataset.num_items, config.max_len
        train = dataset.train()
        self.histories = [(train[row] + 1).tolist() for row in range(len(train.lengths))]
        self.model = PaddedSASRec(config, dataset.num_items).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.bce = nn.BCEWithLogitsLoss()

    def step(self, users: np.ndarray) -> None:
        batch = [self.sample(self.histories[user]) for user in users]
        sequences, positives, negatives = (torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True))
        positive_logits, negative_logits = self.model(sequences, positives, negatives)
        self.optimizer.zero_grad()
        real = torch.where(positives != 0)
        loss = self.bce(positive_logits[real], torch.ones_like(positive_logits[real]))
        loss += self.bce(negative_logits[real], torch.zeros_like(negative_logits[real]))
        loss.backward()
        self.optimizer.step()
        if not np.isfinite(loss.item()):
            raise ValueError("the loss is not finite")

    def sample(self, history: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One user's padded input, positives and negatives."""
        sequence, positive, negative = (np.zeros(self.max_len, dtype=np.int64) for _ in range(3))
        seen = set(history)
        following, place = history[-1], self.max_len - 1
        for item in reversed(history[:-1]):
            sequence[place], positive[place] = item, following
            drawn = random.randint(1, self.num_items)
            while drawn in seen:
                drawn = random.randint(1, self.num_items)
            negative[place] = drawn
            following = item
            place -= 1
            if place < 0:
                break
        return sequence, positive, negative
