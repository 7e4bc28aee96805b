"""CAFE: a coarse encoder over intents, a fine one over items, and the joint probability of both (Eq. 4-10).

R^c = intent encoder (plain), R^v = item encoder (distance mask), R = R^v + R^c                     (Eq. 4-7)
r^c_j = R^c . E^c_j,  r^v_k = R . E^v_k                                                              (Eq. 8)
score(v) = log sigma(r^v_v) + log sigma(r^c_{c(v)})                                                  (Eq. 10, by its logarithm)

`calibrate` fits weights on validation. Among the whole catalog

score(v) = r^v_v + a log P(c(v)) + b log P(v | c(v))

P(c) is the model's, and P(v | c) is counted: of the training interactions with the intent, those with the item, plus PSEUDO_COUNT. So an
item of which next to nothing was learned stands behind the items of its intent that people take. Among drawn candidates b = 0: they
were drawn by popularity, and to weigh that is to learn how they were drawn.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import RANKINGS, Batch, Tokens, Weights
from cafe.models.blocks import Encoder, embedding_table
from cafe.models.sasrec import SASRec
from cafe_kernels.losses import sampled_bce, sampled_softmax
from cafe_kernels.topk.reference import JOINS

PSEUDO_COUNT = 0.1  # so that an item that training has not is a tenth of one that it has once


class CAFE(SASRec):
    """SASRec's item side with the distance mask, and an intent encoder whose output joins it."""

    mask = True
    prior: Tensor

    def __init__(self, config: Config, dataset: Dataset, rows: range | None = None) -> None:
        super().__init__(config, dataset, rows)
        self.intent_embedding = embedding_table(self.num_intents, config)
        self.intent_encoder = Encoder(config)
        if config.calibrate:
            counts = torch.from_numpy(dataset.train_counts()).float() + PSEUDO_COUNT
            of_intent = counts.new_zeros(self.num_intents).index_add_(0, self.item_intent, counts)
            self.register_buffer("prior", counts.log() - of_intent.log()[self.item_intent], persistent=False)

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
        self, intent_logits: Tensor | None, weights: Weights | None = None, protocol: str = "full"
    ) -> tuple[Tensor | None, str]:
        """Eq. 10's logarithm, the intent's part times `intent_weight` (1 unless calibrated)."""
        assert intent_logits is not None
        if self.config.join == "item":
            return None, "identity"
        sigmoid = self.config.join == "log_sigmoid"
        scores = logsigmoid(intent_logits) if sigmoid else intent_logits
        factor = self.intent_weight[RANKINGS.index(protocol)] if weights is None else weights[0]
        return factor * scores, "log_sigmoid" if sigmoid else "identity"

    def join(
        self,
        item_logits: Tensor,
        intent_logits: Tensor | None,
        weights: Weights | None = None,
        protocol: str = "full",
    ) -> Tensor:
        intents, join = self.joint_terms(intent_logits, weights, protocol)
        if self.config.calibrate and protocol == "full":
            item_logits = item_logits + (self.prior_weight if weights is None else weights[1]) * self.prior
        return item_logits if intents is None else JOINS[join](item_logits) + intents

    def index_keys(self, items: Tensor) -> Tensor:
        """With the prior as one more column, of which `index_query` has the weight."""
        keys = self.keys(items)
        return torch.cat([keys, self.prior[items, None]], 1) if self.config.calibrate else keys

    def index_query(self, query: Tensor, weights: Weights | None = None) -> Tensor:
        if not self.config.calibrate:
            return query
        weight = self.prior_weight if weights is None else query.new_tensor(weights[1])
        return torch.cat([query, weight.expand(query.shape[0], 1)], 1)
