"""The self-attention encoder of Eq. 1-3 on packed sequences: positions, then blocks of attention and feed-forward.

Two forms of SASRec's block, by `config.block`:

    pre_norm     x = x + attention(LN(x));  x = x + feed_forward(LN(x))
    query_norm   q = LN(x);  x = q + attention(q, x, x);  x = LN(x);  x = x + feed_forward(x)     (the released code)
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding

from cafe.config import Config
from cafe.models.base import Tokens
from cafe_kernels.attention import DistanceMaskedAttention

Masks = Tensor | tuple[float, ...]  # what dropout multiplies its three places in a block by
ROWS = 1 << 16  # of a table that are drawn at once
SITES = 3  # attention's output, the feed-forward's inner and outer ones


def embedding_table(rows: int, config: Config, keep: range | None = None) -> nn.Parameter:
    """(rows, d), as every embedding begins; with `keep` these rows alone, with the numbers that they have in the whole table, of which
    no more than a part is ever in memory."""
    if keep is None:
        return nn.Parameter(torch.randn(rows, config.dim).mul_(config.init_std))
    table = torch.empty(len(keep), config.dim)
    # torch.randn draws multiples of 16 numbers in a row as it draws them at once, and its last 16 anew.
    starts = range(0, max(1, rows - 15), ROWS)
    for start, stop in zip(starts, [*starts[1:], rows], strict=True):
        part = torch.randn(stop - start, config.dim).mul_(config.init_std)
        first, last = max(start, keep.start), min(stop, keep.stop)
        if first < last:
            table[first - keep.start : last - keep.start] = part[first - start : last - start]
    return nn.Parameter(table)


def hide(x: Tensor, tokens: Tokens, hidden: Tensor) -> Tensor:
    """x (T, d) with `hidden` (d) at the targets of a cloze."""
    return x if tokens.targets is None else x.index_copy(0, tokens.targets, hidden.expand(tokens.targets.shape[0], -1))


def make_attention(
    config: Config,
    max_distance: int | None = None,
    kind: type[DistanceMaskedAttention] = DistanceMaskedAttention,
    **options: Any,
) -> DistanceMaskedAttention:
    """The attention of a block: plain, or with a distance mask for sequences of up to `max_distance` tokens."""
    return kind(
        config.dim,
        config.heads,
        max_distance,
        dropout=config.dropout,
        bias=config.attention_bias,
        score_scale=config.score_scale,
        **{"mask_reads": config.mask_reads} | options,
    )


class Block(nn.Module):
    def __init__(self, config: Config, attention: DistanceMaskedAttention) -> None:
        super().__init__()
        d = config.dim
        self.config = config
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(d, eps=1e-8), nn.LayerNorm(d, eps=1e-8)
        self.attention = attention
        self.inner, self.outer = nn.Linear(d, d), nn.Linear(d, d)

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        positions: Tensor | None,
        side: Tensor | None,
        masks: Masks,
        seed: int,
        offset: int,
    ) -> Tensor:
        query = self.norm_attention(x)
        on_query = self.config.block == "query_norm"
        source, residual = (x, query) if on_query else (query, x)
        steered = (query, source) if side is None else (query + side, source + side)
        attended = tokens.attend(
            self.attention,
            steered[0],
            key_value=steered[1],
            value=source,
            positions=positions,
            seed=seed,
            offset=offset,
        ).to(x.dtype)
        x = attended.mul_(masks[0]).add_(residual)
        normed = self.norm_feed_forward(x)
        if on_query:
            x = normed
        inner = self.inner(normed).mul_(masks[1]).relu_()  # a mask is not negative: ReLU and dropout commute
        return self.outer(inner).to(x.dtype).mul_(masks[2]).add_(x)  # under autocast too, the residual is float32


class Encoder(nn.Module):
    """Embeddings of packed tokens (T, d) -> representations (T, d) of each sequence up to each token.

    Positions count from the newest token, as left padding has it: the last token of every sequence reads row n - 1.
    """

    def __init__(self, config: Config, attention: Callable[[Config], DistanceMaskedAttention] = make_attention) -> None:
        super().__init__()
        self.config = config
        self.position = embedding_table(config.max_len, config)
        self.blocks = nn.ModuleList(Block(config, attention(config)) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=1e-8)

    def forward(self, x: Tensor, tokens: Tokens, stream: int, side: Tensor | None = None) -> Tensor:
        """stream: number that no other call of the run has; fixes the dropout.
        side: (T, d), what steers queries and keys beside x (NOVA): with the positions, which then do not enter x."""
        config = self.config
        token = torch.arange(x.shape[0], device=x.device)  # not len(x), which export takes for a constant
        behind = tokens.cu_seqlens.long()[tokens.sequence + 1] - token
        positions = embedding(config.max_len - behind, self.position)
        masks: Masks = (1.0,) * (1 + SITES * config.layers)
        if self.training and config.dropout:
            masks = dropout_masks((len(masks), *x.shape), config.dropout, [config.seed, stream], x.device)
        scale = config.dim**0.5 if config.scale_embeddings else 1.0
        if side is None:
            x = torch.add(positions, x, alpha=scale).mul_(masks[0])
        else:
            x, side = x * scale * masks[0], side + positions
        in_attention = positions if config.qk_positions else None
        for number, block in enumerate(self.blocks):
            of_block = masks[1 + SITES * number :][:SITES]
            x = block(x, tokens, in_attention, side, of_block, config.seed, stream * len(self.blocks) + number)
        return self.norm(x)


def dropout_masks(shape: tuple[int, ...], p: float, seed: list[int], device: torch.device) -> Tensor:
    """float32 of `shape`: 0 with probability p, else 1 / (1 - p).

    On the CPU 16 random bits decide each element, at a tenth of the cost of torch's dropout there; p is rounded to a multiple of
    2^-16, and the mean is exactly 1. On a GPU torch's generator draws them.
    """
    if device.type != "cpu":
        return dropout(torch.ones(shape, device=device), p)
    size, dropped = math.prod(shape), min(round(p * 2**16), 2**16 - 1)
    bits = np.random.SFC64(seed).random_raw(-(-size // 4)).view(np.uint16)[:size]
    kept = np.float32(2**16 / (2**16 - dropped))
    return torch.from_numpy(np.multiply(bits >= dropped, kept, dtype=np.float32).reshape(shape))


def last_tokens(cu_seqlens: Tensor) -> Tensor:
    """int64 (B,): where each sequence's newest token is. Sequences may not be empty."""
    return cu_seqlens[1:].long() - 1
