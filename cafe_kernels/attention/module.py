"""Multi-head self-attention re-weighted by a learned distance mask (Eq. 2-6) on packed sequences.

The module turns the mask's parameters into the two inputs of the op: the shift W_L / scale of the query, since
K_j . W_L = scale * (W_L / scale) . K_j, and the bias by distance r[t] = D[t] . W_L. Of D's 2n rows only the n causal ones exist here,
and b_L is left out: the softmax cancels both, their gradients are exactly zero.
"""

import math

import torch
from torch import Tensor, nn


class DistanceMaskedAttention(nn.Module):
    """Causal multi-head self-attention with theta_ij of Eq. 6, on packed tokens.

    Args:
        embed_dim: d, a multiple of num_heads.
        num_heads: M.
        max_distance: n, the longest sequence. None leaves the mask out (theta = 1).
        dropout: share of attention weights dropped in training.
        bias: biases in the four projections.
        score_scale: "sqrt_d" (Eq. 5: 1 / sqrt(d)) or "sqrt_head_dim" (1 / sqrt(d / M)).
        mask_reads: "keys" (Eq. 6) or "values" (the released code: V_j . W_L in place of K_j . W_L).

    Example:
        >>> attention = DistanceMaskedAttention(32, num_heads=2, max_distance=50)
        >>> attention(torch.randn(5, 32), torch.tensor([0, 2, 5], dtype=torch.int32)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_distance: int | None,
        dropout: float = 0.0,
        bias: bool = True,
        score_scale: str = "sqrt_d",
        mask_reads: str = "keys",
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        self.num_heads, self.head_dim, self.dropout = num_heads, embed_dim // num_heads, dropout
        self.scale = {"sqrt_d": embed_dim, "sqrt_head_dim": self.head_dim}[score_scale] ** -0.5
        self.mask_reads = mask_reads
        self.query, self.key, self.value, self.out = (nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)
        if max_distance is None:
            self.register_parameter("distance", None)
        else:  # W_L = 0 starts at theta = 1; D must not be zero too, or neither would ever move.
            self.distance = nn.Parameter(torch.randn(num_heads, max_distance, self.head_dim) / math.sqrt(self.head_dim))
            self.distance_weight = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def log_theta(self) -> Tensor | None:
        """ln theta by head and distance, (H, max_distance), less the part that the softmax cancels or the keys carry."""
        if self.distance is None:
            return None
        return torch.einsum("htd,hd->ht", self.distance, self.distance_weight)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        *,
        max_seqlen: int | None = None,
        key_value: Tensor | None = None,
        positions: Tensor | None = None,
        seed: int = 0,
        offset: int = 0,
    ) -> Tensor:
        """x (total, embed_dim) -> (total, embed_dim). `key_value`: what keys and values read, default x.
        `positions` (total, embed_dim) is added to queries and keys (the released code does so)."""
        from cafe_kernels.attention import distance_attention

        source = x if key_value is None else key_value
        q, k, v = (
            linear(t).unflatten(-1, (self.num_heads, self.head_dim))
            for linear, t in ((self.query, x), (self.key, source), (self.value, source))
        )
        if positions is not None:
            heads = positions.unflatten(-1, (self.num_heads, self.head_dim))
            q, k = q + heads, k + heads
        if self.distance is not None:
            shift = self.distance_weight / self.scale
            if self.mask_reads == "keys":
                q = q + shift
            else:
                q, k = torch.cat([q, shift.expand_as(q)], -1), torch.cat([k, v], -1)
                v = torch.cat([v, torch.zeros_like(v)], -1)
        out = distance_attention(
            q, k, v, self.log_theta(), cu_seqlens,
            max_seqlen=max_seqlen, scale=self.scale, dropout_p=self.dropout if self.training else 0.0, seed=seed, offset=offset,
        )  # fmt: skip
        return self.out(out[..., : self.head_dim].flatten(1))
