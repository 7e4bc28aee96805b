"""What all models share: the interface of scoring, and the batch that training feeds them."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe_kernels import DistanceMaskedAttention

RANKINGS = ("full", "aligned")  # the rankings that `intent_weight` has a weight for
Weights = tuple[float, float]  # of the intent and of the item's prior in the joint score


class Scores(NamedTuple):
    """Raw logits: of items (B, candidates), and of intents or None for a model without intents."""

    item: Tensor
    intent: Tensor | None


@dataclass(kw_only=True)
class Tokens:
    """Packed histories, as an encoder reads them.

    items: int64 (T,); cu_seqlens: int32 (B + 1); max_seqlen: int; sequence: int64 (T,), each token's row.
    targets: int64 (M,), for a cloze: the tokens whose items are hidden. None hides nothing.
    users: int64 (B,), each row's user in the dataset; None where they are not known.
    step: number of the training step; with the seed it fixes every random choice.
    """

    items: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    sequence: Tensor
    targets: Tensor | None = None
    users: Tensor | None = None
    step: int = 0

    def attend(self, attention: DistanceMaskedAttention, x: Tensor, **options: Any) -> Tensor:
        """`attention` of x (T, d) within each sequence; options as `DistanceMaskedAttention.packed` has them."""
        return attention.packed(x, self.cu_seqlens, max_seqlen=self.max_seqlen, **options)


@dataclass(kw_only=True)
class Batch(Tokens):
    """Training sequences: at token t of a sequence the model has seen items up to t and must name `positives[t]`; in a cloze it
    has seen all but the hidden ones, and must name `positives[m]` at token `targets[m]`. N is T or M.

    positives: int64 (N,).
    negatives: int64 (N, K), or (K,) shared by the batch, and then ignore: bool (B, K), which of them a row's user has had.
    negative_log_q: log of the expected count of each draw, like negatives; positive_log_q (N,) likewise.
    intent_negatives: int64 (N, 1) where intents are trained with one negative.
    rows: int64 (n,), with a table in host memory: the items of the batch, ascending; items, positives and negatives are then
        numbers of these rows. It stays on the host.
    """

    positives: Tensor
    negatives: Tensor
    ignore: Tensor | None = None
    negative_log_q: Tensor | None = None
    positive_log_q: Tensor | None = None
    intent_negatives: Tensor | None = None
    rows: Tensor | None = None

    def of_its_rows(self) -> "Batch":
        """The batch for a table in host memory, of which only its own `rows` visit the device."""
        parts = self.items, self.positives, self.negatives
        rows, place = torch.unique(torch.cat([x.flatten() for x in parts]), return_inverse=True)
        items, positives, negatives = (
            x.view(part.shape) for x, part in zip(place.split([p.numel() for p in parts]), parts, strict=True)
        )
        return replace(self, items=items, positives=positives, negatives=negatives, rows=rows)

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from where `to` copies to a GPU while the CPU goes on."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return Batch(**pinned)

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name != "rows" else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


class Model(nn.Module):
    """Base of all models: knows its configuration and its catalog."""

    cloze = False  # trained to fill gaps, and asked for the gap behind a history
    personal = False  # reads who the user is
    item_intent: Tensor
    intent_weight: Tensor
    prior_weight: Tensor

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__()
        self.config = config
        self.num_items, self.num_intents = dataset.num_items, dataset.num_intents
        self.register_buffer("item_intent", torch.from_numpy(dataset.item_intent.astype("int64")), persistent=False)
        self.register_buffer("intent_weight", torch.ones(len(RANKINGS)))
        self.register_buffer("prior_weight", torch.zeros(()))

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Scores:
        """Logits for what follows each history.

        Args:
            items: int64 (total,), histories packed; cu_seqlens: int32 (B + 1).
            candidates: int64 (B, K) items to score, or None for all: then item logits are (B, num_items) and intent
                logits (B, num_intents), to be gathered by each item's intent.
            candidate_intents: int64 (B, K), by default each candidate's own (Eq. 10).
            users: int64 (B,), the histories' users in the dataset, for a `personal` model; None where they are not known.
        """
        raise NotImplementedError(f"{type(self).__name__}.score")

    def join(
        self,
        item_logits: Tensor,
        intent_logits: Tensor | None,
        weights: Weights | None = None,
        protocol: str = "full",
    ) -> Tensor:
        """The joint score of items and their intents (Eq. 10): the item logits where there are no intents.

        weights: in place of the calibrated ones.
        protocol: which of the calibrated weights; candidates drawn by popularity and the whole catalog want different ones. "full"
            has the logits of the whole catalog, (B, num_items).
        """
        return item_logits

    def loss(self, batch: Batch) -> Tensor:
        """The mean training loss of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch)

    def tables(self) -> list[nn.Parameter]:
        """The (rows, d) tables whose gradients are sparse: those of which a step reads only some rows."""
        raise NotImplementedError(f"{type(self).__name__}.tables")

    def rows_read(self, batch: Batch) -> list[Tensor]:
        """Of each of `tables`, the rows that `loss(batch)` reads: int64, repeats allowed."""
        raise NotImplementedError(f"{type(self).__name__}.rows_read")
