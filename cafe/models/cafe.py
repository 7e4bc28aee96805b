"""CAFE: a coarse encoder over intents, a fine one over items, and the joint probability of both (Eq. 4-10).

R^c = intent encoder (plain), R^v = item encoder (distance mask), R = R^v + R^c                     (Eq. 4-7)
r^c_j = R^c . E^c_j,  r^v_k = R . E^v_k                                                              (Eq. 8)
score(v) = log sigma(r^v_v) + log sigma(r^c_{c(v)})                                                  (Eq. 10, by its logarithm)
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import RANKINGS, Batch, Tokens
from cafe.models.blocks import Encoder, embedding_table
from cafe.models.sasrec import SASRec
from cafe_kernels.losses import sampled_bce, sampled_softmax
from cafe_kernels.topk.reference import JOINS


class CAFE(SASRec):
    """SASRec's item side with the distance mask, and an intent encoder whose output joins it."""

    mask = True

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.intent_embedding = embedding_table(self.num_intents, config)
        self.intent_encoder = Encoder(config)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        coarse = self.intent_encoder(self.read_intents(tokens), tokens, stream=2 * tokens.step + 1)
        fine = self.item_encoder(self.read(tokens), tokens, stream=2 * tokens.step)
        return fine + coarse, coarse

    def intent_logits(self, intent_state: Tensor) -> Tensor:
        logits = intent_state @ self.intent_embedding.T
        return logits.log_softmax(-1) if self.config.join == "log_softmax" else logits

    def loss(self, batch: Batch) -> Tensor:
        state, coarse = self.encode(batch)
        assert coarse is not None
        return self.item_loss(state, batch) + self.intent_loss(coarse, batch)

    def intent_loss(self, coarse: Tensor, batch: Batch) -> Tensor:
        """BCE over the next intent and one negative (Eq. 9), or the full softmax over intents; coarse (T, d)."""
        positives = self.item_intent[batch.positives]
        if self.config.intent_loss == "softmax":
            # All of them, and never (T, C) logits in memory.
            intents = torch.arange(self.num_intents, device=coarse.device)
            return sampled_softmax(coarse, self.intent_embedding, positives, intents)
        assert batch.intent_negatives is not None
        return sampled_bce(coarse, self.intent_embedding, positives, batch.intent_negatives)

    def joint_terms(
        self, intent_logits: Tensor | None, weight: float | None = None, protocol: str = "full"
    ) -> tuple[Tensor | None, str]:
        """Eq. 10's logarithm, the intent's part times `intent_weight` (1 unless calibrated)."""
        assert intent_logits is not None
        if self.config.join == "item":
            return None, "identity"
        sigmoid = self.config.join == "log_sigmoid"
        scores = logsigmoid(intent_logits) if sigmoid else intent_logits
        factor = self.intent_weight[RANKINGS.index(protocol)] if weight is None else weight
        return factor * scores, "log_sigmoid" if sigmoid else "identity"

    def join(
        self, item_logits: Tensor, intent_logits: Tensor | None, weight: float | None = None, protocol: str = "full"
    ) -> Tensor:
        intents, join = self.joint_terms(intent_logits, weight, protocol)
        return item_logits if intents is None else JOINS[join](item_logits) + intents
