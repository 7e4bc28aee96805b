"""Multi-head self-attention re-weighted by a learned distance mask (Eq. 2-6), in place of torch.nn.MultiheadAttention.

The module turns the mask's parameters into the two inputs of the op: the shift W_L / scale of the query, since
K_j . W_L = scale * (W_L / scale) . K_j, and the bias by distance r[t] = D[n + t] . W_L. Of D's 2n rows only those exist here that are
read, t = 0 ... n - 1 or, not causal, t = -(n - 1) ... n - 1; Q_i . W_L and b_L are left out: the softmax cancels both, their
gradients are exactly zero.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from cafe_kernels.attention import reference


class DistanceMaskedAttention(nn.Module):
    """Multi-head self-attention with theta_ij of Eq. 6. Called as torch.nn.MultiheadAttention, or by `packed`.

    Args:
        embed_dim: d, a multiple of num_heads.
        num_heads: M.
        max_distance: n, the longest sequence. None leaves the mask out (theta = 1).
        dropout: share of attention weights dropped in training.
        bias: biases in the four projections.
        batch_first: tensors of the padded call are (B, N, d) instead of (N, B, d).
        score_scale: "sqrt_d" (Eq. 5: 1 / sqrt(d)) or "sqrt_head_dim" (1 / sqrt(d / M), as torch.nn.MultiheadAttention).
        mask_reads: "keys" (Eq. 6) or "values" (the released code: V_j . W_L in place of K_j . W_L).
        causal: each token sees itself and what is before it; False: all tokens of its sequence (as BERT4Rec).
        local_heads: how many heads, the first ones, have the mask; default all. The others have theta = 1.
        device, dtype: of the parameters.

    Parameters: in_proj_weight (3d, d), in_proj_bias (3d), out_proj.weight (d, d) and out_proj.bias (d), as
    torch.nn.MultiheadAttention names them, so that its state dict loads with strict=False; and of the mask
    distance (L, n, d / M), the rows D[n + t] of Eq. 6 for t = i - j from 0 on, without `causal` (L, 2n - 1, d / M) from
    -(n - 1) on, and distance_weight (L, d / M), W_L, zero at first: theta = 1. L is local_heads.

    Raises:
        ValueError: options that do not fit each other.

    Source: CAFE, Eq. 2-6.

    Example:
        >>> attention = DistanceMaskedAttention(32, num_heads=2, max_distance=50, batch_first=True)
        >>> x, padding = torch.randn(2, 3, 32), torch.tensor([[False, False, True], [False, False, False]])
        >>> out, weights = attention(x, x, x, key_padding_mask=padding, is_causal=True)
        >>> out.shape, weights.shape
        (torch.Size([2, 3, 32]), torch.Size([2, 3, 3]))
        >>> tokens, cu_seqlens = x[~padding], torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> torch.allclose(attention.packed(tokens, cu_seqlens), out[~padding], atol=1e-6)
        True
    """

    # torch.nn.TransformerEncoderLayer asks; True would let its fused inference read our weights and leave out the mask.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_distance: int | None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        score_scale: str = "sqrt_d",
        mask_reads: str = "keys",
        causal: bool = True,
        local_heads: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if max_distance is not None and max_distance < 1:
            raise ValueError(f"max_distance must be the longest sequence's length or None, got {max_distance}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if score_scale not in ("sqrt_d", "sqrt_head_dim"):
            raise ValueError(f"score_scale must be 'sqrt_d' or 'sqrt_head_dim', got {score_scale!r}")
        if mask_reads not in ("keys", "values"):
            raise ValueError(f"mask_reads must be 'keys' or 'values', got {mask_reads!r}")
        local_heads = num_heads if local_heads is None else local_heads
        if not 1 <= local_heads <= num_heads:
            raise ValueError(f"local_heads must be from 1 to num_heads={num_heads}, got {local_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.max_distance, self.dropout, self.batch_first = max_distance, dropout, batch_first
        self.scale = (embed_dim if score_scale == "sqrt_d" else self.head_dim) ** -0.5
        self.mask_reads, self.causal = mask_reads, causal
        options = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        for weight in (*self.in_proj_weight.chunk(3), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)
        self.distance = self.distance_weight = None
        if max_distance is not None:  # W_L = 0 starts at theta = 1; D must not be zero too, or neither would ever move.
            rows = max_distance if causal else 2 * max_distance - 1
            table = torch.randn(local_heads, rows, self.head_dim, **options) / math.sqrt(self.head_dim)
            self.distance = nn.Parameter(table)
            self.distance_weight = nn.Parameter(torch.zeros(local_heads, self.head_dim, **options))

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, max_distance: int | None, causal: bool = True
    ) -> "DistanceMaskedAttention":
        """A module with the weights and options of `attention` and theta = 1: its outputs, `causal` or not, are the same at first.

        A torch.nn.TransformerEncoder whose layers are changed so, and that is called without a mask, needs
        enable_nested_tensor=False.

        Raises:
            ValueError: `attention` has kdim, vdim, add_bias_kv or add_zero_attn, which do not exist here.

        Example:
            >>> layer = nn.TransformerEncoderLayer(32, nhead=2, batch_first=True)
            >>> layer.self_attn = DistanceMaskedAttention.from_multihead_attention(layer.self_attn, max_distance=50)
        """
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "kdim, vdim, add_bias_kv and add_zero_attn have no counterpart here: keep that MultiheadAttention"
            )
        weight, bias = attention.in_proj_weight, attention.in_proj_bias is not None
        module = cls(
            attention.embed_dim, attention.num_heads, max_distance, attention.dropout, bias, attention.batch_first,
            score_scale="sqrt_head_dim", causal=causal, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        module.load_state_dict(attention.state_dict(), strict=False)
        for name, parameter in attention.named_parameters():
            module.get_parameter(name).requires_grad_(parameter.requires_grad)
        return module.train(attention.training)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, max_distance={self.max_distance}, dropout={self.dropout}, "
            f"bias={self.in_proj_bias is not None}, batch_first={self.batch_first}, scale={self.scale:.4g}, "
            f"mask_reads={self.mask_reads!r}, causal={self.causal}"
        )

    def log_theta(self) -> Tensor | None:
        """ln theta by head and distance, (M, n), without `causal` (M, 2n - 1), less the part that the softmax cancels or the keys
        carry; None without mask."""
        if self.distance is None or self.distance_weight is None:
            return None
        # Not a matrix product, which autocast would round.
        return self._all_heads((self.distance * self.distance_weight[:, None]).sum(-1))

    def _all_heads(self, local: Tensor) -> Tensor:
        """(L, x) -> (M, x), zeros for the heads without a mask."""
        return local if len(local) == self.num_heads else pad(local, (0, 0, 0, self.num_heads - len(local)))

    def theta_curves(self) -> Tensor:
        """What was learned: ln theta at each distance less that at distance 0, float32 (M, n), detached; without `causal`
        (M, 2n - 1), with distance 0 in the middle and the past to the right of it.

        The softmax is blind to a constant, so exp(curve[m, t]) is what counts: how many times the weight of the token t
        steps back is that of the token itself in head m, the rest being equal. What theta owes to the keys is not in it.

        Raises:
            ValueError: the module has no mask.
        """
        log_theta = self.log_theta()
        if log_theta is None:
            raise ValueError("max_distance=None: this module has no distance mask to show")
        itself = 0 if self.causal else log_theta.shape[1] // 2
        return (log_theta - log_theta[:, itself, None]).detach().float()

    def packed(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        *,
        max_seqlen: int | None = None,
        key_value: Tensor | None = None,
        value: Tensor | None = None,
        positions: Tensor | None = None,
        seed: int | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Attention within each sequence of a packed batch, without padding.

        Args:
            x: (total, embed_dim), the tokens of all sequences.
            cu_seqlens: int32 (B + 1), where each sequence begins; from 0 to total. Sequences may be empty.
            max_seqlen: the longest sequence, to spare its computation.
            key_value: (total, embed_dim), what keys and values read; default x.
            value: (total, embed_dim), what values read; default what keys read.
            positions: (total, embed_dim), added to queries and keys (the released code does so).
            seed, offset: fix the dropout; by default the seed is drawn from torch's generator.

        Returns:
            (total, embed_dim).

        Raises:
            ValueError: as `distance_attention`.
        """
        source = x if key_value is None else key_value
        inputs = self._op_inputs(x, source, source if value is None else value, positions)
        return self._attend(inputs, cu_seqlens, max_seqlen, self._seed() if seed is None else seed, offset)

    def dense(
        self,
        x: Tensor,
        real: Tensor,
        *,
        key_value: Tensor | None = None,
        value: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `packed` without dropout, on rows of one length, in operations of plain PyTorch alone: for exporters (ONNX).

        Args:
            x: (B * N, embed_dim), N at most max_distance; key_value, value, positions likewise, as for `packed`.
            real: bool (B, N), False at padding, which no token sees but itself.

        Returns:
            (B * N, embed_dim); at padding numbers that mean nothing.
        """
        source = x if key_value is None else key_value
        inputs = self._op_inputs(x, source, source if value is None else value, positions)
        q, k, v = (rows.unflatten(0, real.shape).transpose(1, 2) for rows in inputs)
        position = torch.arange(real.shape[1], device=x.device)
        distance = position[:, None] - position
        logits = q @ k.transpose(-1, -2) * self.scale
        log_theta = self.log_theta()
        if log_theta is not None:
            column = distance.clamp(min=0) if self.causal else distance + log_theta.shape[1] // 2
            logits = logits + log_theta[:, column]
        hidden = ~real[:, None, None] | ((distance < 0) & self.causal)
        weights = logits.masked_fill(hidden & (distance != 0), -torch.inf).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2)[..., : self.head_dim].flatten(2).flatten(0, 1))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention, self-attention only. Padding costs nothing: it is packed away.

        Args:
            query, key, value: (N, B, d), with batch_first (B, N, d), or one sequence (N, d); of one shape.
            key_padding_mask: (B, N) or (N), True (or -inf) where a token is padding, before or after a row's tokens.
            need_weights: also return the weights, by plain PyTorch: False spares an n x n matrix.
            attn_mask: the causal mask (N, N) or (B M, N, N): True (or -inf) where the key comes after the query. None where the
                module is not causal.
            average_attn_weights: average the returned weights over the heads.
            is_causal: take it that attn_mask, if any, is causal, and do not look. False where the module is not.

        Returns:
            The output, of query's shape, zero at padding (torch.nn.MultiheadAttention has NaN or a value that nobody reads
            there); and None or the weights, dropout included, (B, N, N) or (B, M, N, N) or without B, zero at padding.

        Raises:
            ValueError: cross-attention, a mask that is not causal or none, or any where the module is not causal, padding amid
                a row, more tokens than max_distance.
        """
        if (
            query.is_nested
        ):  # as torch.nn.TransformerEncoder has it in inference, if its layers were built with another attention
            raise ValueError(
                "nested tensors are not supported: build torch.nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if (
            not query.shape == key.shape == value.shape
            or query.dim() not in (2, 3)
            or query.shape[-1] != self.embed_dim
        ):
            raise ValueError(
                f"query, key and value must have one shape, (N, {self.embed_dim}) or batched, since this is self-attention; got "
                f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}: cross-attention stays nn.MultiheadAttention's"
            )
        unbatched, swapped = query.dim() == 2, query.dim() == 3 and not self.batch_first
        batch, length, _ = self._rows(query).shape
        if not self.causal and (is_causal or attn_mask is not None):
            raise ValueError(
                "this attention is not causal: pass neither attn_mask nor is_causal, and padding as key_padding_mask"
            )
        if self.causal and not is_causal:
            _check_causal(attn_mask, query.device, batch * self.num_heads, length)
        padding = None if key_padding_mask is None else _check_padding(key_padding_mask, unbatched, batch, length)
        if padding is None:
            token = None
            lengths = torch.full((batch,), length, device=query.device)
            longest = length
        else:
            token = (~padding).flatten().nonzero().squeeze(1)
            lengths = (~padding).sum(1)
            longest = max(lengths.tolist(), default=0)
        cu_seqlens = pad(lengths.cumsum(0), (1, 0)).int()

        def pack(x: Tensor) -> Tensor:
            x = self._rows(x).flatten(0, 1)
            return x if token is None else x.index_select(0, token)

        q = pack(query)
        k = q if key is query else pack(key)
        v = k if value is key else pack(value)
        inputs, seed = self._op_inputs(q, k, v), self._seed()
        out = self._attend(inputs, cu_seqlens, longest, seed)
        if token is not None:
            out = out.new_zeros(batch * length, self.embed_dim).index_copy(0, token, out)
        out = out.unflatten(0, (batch, length))
        out = out.squeeze(0) if unbatched else out.transpose(0, 1) if swapped else out
        if not need_weights:
            return out, None
        weights = reference.attention_weights(
            *inputs[:2], self.log_theta(), cu_seqlens, longest, self.scale, self.causal, None, self._dropout_p(), seed
        )
        if padding is not None:
            weights = _place(pad(weights, (0, length - longest) * 2), padding)
        if average_attn_weights:
            weights = weights.mean(1)
        return out, weights.squeeze(0) if unbatched else weights

    def _rows(self, x: Tensor) -> Tensor:
        """(B, N, d), whichever layout x has."""
        return x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _seed(self) -> int:
        return _draw_seed() if self._dropout_p() else 0

    def _op_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the op, (total, M, D), from the packed inputs of the three projections."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        # Three products, although one would do for self-attention: its parts would have to be copied, which costs what it spares.
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        )
        if positions is not None:
            heads = positions.unflatten(-1, (self.num_heads, self.head_dim))
            q, k = q + heads, k + heads
        if self.distance_weight is not None:
            shift = self._all_heads(self.distance_weight / self.scale)
            if self.mask_reads == "keys":
                q = q + shift
            else:
                q, k = torch.cat([q, shift.expand_as(q)], -1), torch.cat([k, v], -1)
                v = torch.cat([v, torch.zeros_like(v)], -1)
        return q, k, v

    def _attend(
        self, inputs: tuple[Tensor, ...], cu_seqlens: Tensor, max_seqlen: int | None, seed: int, offset: int = 0
    ) -> Tensor:
        from cafe_kernels.attention import distance_attention

        if max_seqlen and self.max_distance is not None and max_seqlen > self.max_distance:
            raise ValueError(
                f"a sequence of {max_seqlen} tokens, but max_distance={self.max_distance}: build the module for longer ones, "
                "or cut them"
            )
        q, k, v = inputs
        out = distance_attention(
            q, k, v, self.log_theta(), cu_seqlens,
            max_seqlen=max_seqlen, scale=self.scale, causal=self.causal, dropout_p=self._dropout_p(), seed=seed, offset=offset,
        )  # fmt: skip
        return self.out_proj(out[..., : self.head_dim].flatten(1))


@torch.compiler.disable  # a number of Python's, drawn from the generator that eager PyTorch uses
def _draw_seed() -> int:
    return int(torch.randint(2**62, ()))


def _check_causal(attn_mask: Tensor | None, device: torch.device, heads: int, length: int) -> None:
    if attn_mask is None:
        raise ValueError(
            "this attention is causal: pass is_causal=True or the causal attn_mask, or build it with causal=False"
        )
    causal = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    if attn_mask.dtype != torch.bool:
        causal = torch.zeros_like(causal, dtype=torch.float32).masked_fill(causal, -math.inf)
    if attn_mask.shape not in (causal.shape, (heads, *causal.shape)) or not (attn_mask == causal).all():
        raise ValueError(
            f"attn_mask must be the causal one of {length} tokens, ({length}, {length}) or ({heads}, {length}, {length}), "
            "True (or -inf, and 0 elsewhere) above the diagonal, "
            f"got another of shape {tuple(attn_mask.shape)}: every token sees itself and what is before it; give padding as "
            "key_padding_mask"
        )


def _check_padding(mask: Tensor, unbatched: bool, batch: int, length: int) -> Tensor:
    """bool (B, N), True at padding."""
    if mask.shape != ((length,) if unbatched else (batch, length)):
        raise ValueError(
            f"key_padding_mask must be {(length,) if unbatched else (batch, length)}, got {tuple(mask.shape)}"
        )
    padding = (mask if mask.dtype == torch.bool else mask == -math.inf).reshape(batch, length)
    if mask.dtype != torch.bool and mask.masked_fill(padding.view_as(mask), 0).any():
        raise ValueError("key_padding_mask must be bool, or float with -inf at padding and 0 elsewhere")
    # A token that follows padding which follows a token.
    seen = (~padding).cumsum(1) > 0
    holes = (~padding) & ((padding & seen).cumsum(1) > 0)
    if holes.any():
        raise ValueError(
            f"key_padding_mask has padding between the tokens of row {int(holes.any(1).nonzero()[0])}: move all padding of "
            "a row before or after its tokens, or call `packed`"
        )
    return padding


def _place(weights: Tensor, padding: Tensor) -> Tensor:
    """Weights (B, M, N, N) of sequences that begin at row 0, moved to where their tokens are; zero at padding."""
    batch, length = padding.shape
    position = torch.arange(length, device=padding.device)
    first = ((~padding).cumsum(1) == 0).sum(1, keepdim=True)
    source = (position - first) % max(length, 1)
    rows = torch.arange(batch, device=padding.device)[:, None, None]
    placed = weights[rows, :, source[:, :, None], source[:, None, :]].permute(0, 3, 1, 2)
    return placed.masked_fill((padding[:, :, None] | padding[:, None, :])[:, None], 0)
