"""The self-attention encoder of Eq. 1-3 on packed sequences: positions, then blocks of attention and feed-forward.

Two forms of SASRec's block, by `config.block`:

    pre_norm     x = x + attention(LN(x));  x = x + feed_forward(LN(x))
    query_norm   q = LN(x);  x = q + attention(q, x, x);  x = LN(x);  x = x + feed_forward(x)     (the released code)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from cafe.config import Config
from cafe_kernels.attention import DistanceMaskedAttention


class Block(nn.Module):
    def __init__(self, config: Config, mask: bool) -> None:
        super().__init__()
        d = config.dim
        self.config = config
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(d, eps=1e-8), nn.LayerNorm(d, eps=1e-8)
        self.attention = DistanceMaskedAttention(
            d,
            config.heads,
            config.max_len if mask else None,
            dropout=config.dropout,
            bias=config.attention_bias,
            score_scale=config.score_scale,
            mask_reads=config.mask_reads,
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(d, d), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(d, d), nn.Dropout(config.dropout)
        )

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, positions: Tensor | None, seed: int, offset: int
    ) -> Tensor:
        options: dict[str, Any] = {"max_seqlen": max_seqlen, "positions": positions, "seed": seed, "offset": offset}
        query = self.norm_attention(x)
        if self.config.block == "query_norm":
            x = query + dropout(
                self.attention.packed(query, cu_seqlens, key_value=x, **options), self.config.dropout, self.training
            )
            x = self.norm_feed_forward(x)
            return x + self.feed_forward(x)
        x = x + dropout(self.attention.packed(query, cu_seqlens, **options), self.config.dropout, self.training)
        return x + self.feed_forward(self.norm_feed_forward(x))


class Encoder(nn.Module):
    """Embeddings of packed tokens (T, d) -> representations (T, d) of each sequence up to each token.

    Positions count from the newest token, as left padding has it: the last token of every sequence reads row n - 1.
    """

    def __init__(self, config: Config, mask: bool = False) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.randn(config.max_len, config.dim) * config.init_std)
        self.blocks = nn.ModuleList(Block(config, mask) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, sequence: Tensor, stream: int) -> Tensor:
        """sequence: int64 (T,), each token's row. stream: number that no other call of the run has; fixes the dropout."""
        token = torch.arange(len(x), device=x.device)
        positions = self.position[self.config.max_len - cu_seqlens.long()[sequence + 1] + token]
        if self.config.scale_embeddings:
            x = x * self.config.dim**0.5
        x = dropout(x + positions, self.config.dropout, self.training)
        in_attention = positions if self.config.qk_positions else None
        for number, block in enumerate(self.blocks):
            x = block(x, cu_seqlens, max_seqlen, in_attention, self.config.seed, stream * len(self.blocks) + number)
        return self.norm(x)


def last_tokens(cu_seqlens: Tensor) -> Tensor:
    """int64 (B,): where each sequence's newest token is. Sequences may not be empty."""
    return cu_seqlens[1:].long() - 1
