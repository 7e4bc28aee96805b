"""Losses over one positive and a few sampled negatives a token, in place of the whole catalog, fused with their gradients.

    sampled_bce      -log sigma(s) - sum_k log(1 - sigma(s_k))                                           (Eq. 9 of CAFE)
    gbce             -(beta log sigma(s) + sum_k log(1 - sigma(s_k))) / (K + 1)                          (gSASRec)
    sampled_softmax  -log( e^(s - log q) / (e^(s - log q) + sum_k e^(s_k - log q_k)) )                   (log-Q correction)

s = h . E[positive], s_k = h . E[negative k]. No tensor of (tokens, K, d) is ever made, and the table's gradient can be sparse: a
row for each distinct item drawn.
"""

import torch
from torch import Tensor

from cafe_kernels.backends import choose_backend
from cafe_kernels.losses import ops, reference

__all__ = ["gbce", "sampled_bce", "sampled_softmax"]


def sampled_bce(
    h: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    sequence: Tensor | None = None,
    ignore: Tensor | None = None,
    compose: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Binary cross entropy of the positive and K negatives, summed over the K + 1: Eq. 9.

    Args:
        h: (T, d) representations of the tokens. Logits and gradients are computed in float32 (float64: see `backend`).
        table: (V, d) item embeddings E; float32 or bfloat16.
        positives: int (T,), ids of items.
        negatives: int (T, K) for each token; (B, K) for each sequence, with `sequence`; or (K,) for all tokens. The shared ones are
            a matrix product (those of short sequences are not), and take at most 56 bytes of memory for each token and negative. A
            negative that equals a token's positive does not count for that token.
        sequence: int (T,), each token's row of (B, K) negatives, ascending, and of (B, K) `ignore`.
        ignore: bool (T, K), or with `sequence` (B, K): negatives that do not count, such as those that the user has had.
        compose: (intent_table (C, d), item_intent int (V,)): then E[v] = table[v] + intent_table[item_intent[v]].
        reduction: "mean" over tokens, "sum", or "none" for (T,). The mean over no tokens is nan.
        sparse_grad: the gradient of `table` is a coalesced sparse tensor of the distinct rows drawn, for a row-sparse optimizer,
            in place of a dense one. (PyTorch drops the mark when it stores the gradient in `table.grad`, and the reference never sets
            it; `table.grad._coalesced_(True)` puts it back, since the ids ascend and are distinct.) On a GPU, where to count distinct
            rows would wait for all work before, it is not coalesced: a row for each id drawn, the sum at its first, zeros at others.
        backend: "reference" (PyTorch, any dtype, twice differentiable), "cpu" (C++), "triton"; None chooses.

    Returns:
        The loss, float32 (float64 where h or table is), a scalar or (T,). Infinite and nan logits give what PyTorch's losses give.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
        IndexError: ids out of range (CPU; on a GPU, where looking at values waits for all work before them, nobody checks).

    Source: CAFE, Eq. 9.

    Example:
        >>> h, table = torch.randn(5, 16), torch.randn(100, 16)
        >>> sampled_bce(h, table, torch.arange(5), torch.randint(100, (5, 3))).shape
        torch.Size([])
    """
    weights = 1.0, 1.0
    return _loss(
        h, table, positives, negatives, sequence, ignore, compose, None, "bce", weights, reduction, sparse_grad, backend
    )


def gbce(
    h: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    t: float = 0.75,
    sampling_rate: float | None = None,
    sequence: Tensor | None = None,
    ignore: Tensor | None = None,
    compose: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Generalised binary cross entropy, which undoes the overconfidence that few negatives cause.

        -(log sigma(s)^beta + sum_k log(1 - sigma(s_k))) / (K + 1),    beta = alpha (t (1 - 1 / alpha) + 1 / alpha) = 1 - t (1 - alpha)

    Args:
        t: calibration; 0 is plain BCE (beta = 1), 1 gives calibrated probabilities (beta = alpha).
        sampling_rate: alpha, the share of all negatives that is drawn; default K / (V - 1).

    The other arguments are as in `sampled_bce`.

    Source: Petrov & Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation Trained with Negative Sampling",
    RecSys 2023, Eq. 9 and 12.

    Example:
        >>> h, table = torch.randn(5, 16), torch.randn(100, 16)
        >>> gbce(h, table, torch.arange(5), torch.randint(100, (8,)), t=0.9).shape
        torch.Size([])
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}")
    count = negatives.shape[-1] if negatives.dim() else 0
    alpha = min(1.0, count / max(1, len(table) - 1)) if sampling_rate is None else sampling_rate
    if not 0 < alpha <= 1 and count:
        raise ValueError(f"sampling_rate must be in (0, 1], got {alpha}")
    weights = (1 - t * (1 - alpha)) / (count + 1), 1 / (count + 1)
    return _loss(
        h, table, positives, negatives, sequence, ignore, compose, None, "bce", weights, reduction, sparse_grad, backend
    )


def sampled_softmax(
    h: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    log_q: tuple[Tensor, Tensor] | None = None,
    sequence: Tensor | None = None,
    ignore: Tensor | None = None,
    compose: tuple[Tensor, Tensor] | None = None,
    reduction: str = "mean",
    sparse_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of the positive among itself and the negatives, with log-Q correction.

    Args:
        log_q: (of the positives (T,), of the negatives (as `negatives`)): the logarithm of how often an item is expected among
            the K draws, log(K q). It is taken from the logits, so that the loss estimates the softmax over the whole catalog.
            None leaves them. They are numbers, not learned: a tensor that requires a gradient is refused.

    The other arguments are as in `sampled_bce`.

    Source: Bengio & Senecal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model", 2008.

    Example:
        >>> h, table, q = torch.randn(5, 16), torch.randn(100, 16), torch.full((100,), 1 / 100)
        >>> positives, negatives = torch.arange(5), torch.randint(100, (8,))
        >>> sampled_softmax(h, table, positives, negatives, log_q=((8 * q[positives]).log(), (8 * q[negatives]).log())).shape
        torch.Size([])
    """
    weights = 1.0, 1.0
    return _loss(
        h, table, positives, negatives, sequence, ignore, compose, log_q, "softmax", weights, reduction, sparse_grad, backend
    )  # fmt: skip


def _loss(
    h: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    sequence: Tensor | None,
    ignore: Tensor | None,
    compose: tuple[Tensor, Tensor] | None,
    log_q: tuple[Tensor, Tensor] | None,
    kind: str,
    weights: tuple[float, float],
    reduction: str,
    sparse_grad: bool,
    backend: str | None,
) -> Tensor:
    if h.dim() != 2 or table.dim() != 2 or h.shape[1] != table.shape[1] or 0 in table.shape:
        raise ValueError(
            f"h must be (T, d) and table (V >= 1, d >= 1) of one width d, got {tuple(h.shape)} and {tuple(table.shape)}"
        )
    if not (h.is_floating_point() and table.is_floating_point()):
        raise ValueError(f"h and table must be floating point, got {h.dtype} and {table.dtype}")
    if negatives.dim() not in (1, 2) or negatives.shape[-1] < 1:
        raise ValueError(f"negatives must be (T, K), (B, K) or (K,) with K >= 1, got {tuple(negatives.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    tokens, (*rows, count) = len(h), negatives.shape
    if rows and sequence is None and rows[0] != tokens:
        raise ValueError(
            f"negatives have {rows[0]} rows for {tokens} tokens: give (T, K), (K,), or `sequence` with (B, K)"
        )
    for name, pair in (("compose", compose), ("log_q", log_q)):
        if pair is not None and (len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair)):
            raise ValueError(f"{name} must be two tensors or None, got {', '.join(type(x).__name__ for x in pair)}")
    if log_q is not None and any(x.requires_grad for x in log_q):
        raise ValueError("log_q requires a gradient, and the losses have none for it: detach() it")
    intents, item_intent = compose or (None, None)
    positive_log_q, negative_log_q = log_q or (None, None)
    ignored = rows[0] if rows else tokens if sequence is None or ignore is None or ignore.dim() != 2 else len(ignore)
    for name, x, shape in (
        ("positives", positives, (tokens,)),
        ("sequence", sequence, (tokens,)),
        ("ignore", ignore, (ignored, count)),
        ("item_intent of compose", item_intent, (len(table),)),
        ("log_q of the positives", positive_log_q, (tokens,)),
        ("log_q of the negatives", negative_log_q, tuple(negatives.shape)),
        ("intent_table of compose", intents, (0 if intents is None else len(intents), h.shape[1])),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    for name, x in (
        ("positives", positives),
        ("negatives", negatives),
        ("sequence", sequence),
        ("item_intent", item_intent),
    ):
        if x is not None and x.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32, got {x.dtype}")
    if ignore is not None and ignore.dtype != torch.bool:
        raise ValueError(f"ignore must be bool, got {ignore.dtype}")
    if intents is not None and intents.dtype != table.dtype:
        raise ValueError(f"intent_table and table must have one dtype, got {intents.dtype} and {table.dtype}")
    others = (table, intents, item_intent, positives, negatives, sequence, ignore, positive_log_q, negative_log_q)
    if devices := {str(x.device) for x in others if x is not None and x.device != h.device}:
        raise ValueError(f"all tensors must be on h's device {h.device}, got some on {', '.join(sorted(devices))}")

    positives, negatives = positives.long(), negatives.long()
    sequence, item_intent = (x if x is None else x.long() for x in (sequence, item_intent))
    chosen = choose_backend(backend, ops.backend_module, h, table)
    if chosen == "reference":
        if h.dtype != torch.float64:
            h = h.float()
        losses = reference.sampled_loss(
            h, table, intents, item_intent, positives, negatives, sequence, ignore, positive_log_q, negative_log_q,
            kind, *weights, sparse_grad,
        )  # fmt: skip
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
    positive_log_q, negative_log_q = (x if x is None else x.float() for x in (positive_log_q, negative_log_q))
    learned = h.requires_grad or table.requires_grad or (intents is not None and intents.requires_grad)
    loss, *_ = ops.forward_op(
        h.float(), table, intents, item_intent, positives, negatives, sequence, ignore, positive_log_q, negative_log_q,
        kind, *weights, reduction, torch.is_grad_enabled() and learned, sparse_grad, chosen,
    )  # fmt: skip
    return loss
