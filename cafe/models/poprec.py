"""PopRec: every user is recommended the items that training has most often."""

import torch
from torch import Tensor

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Model, Scores


class PopRec(Model):
    """Counts of training interactions; nothing to learn by gradient."""

    counts: Tensor

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.register_buffer("counts", torch.from_numpy(dataset.train_counts()).float())

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Scores:
        if candidates is not None:
            return Scores(self.counts[candidates], None)
        return Scores(self.counts.expand(len(cu_seqlens) - 1, -1), None)
