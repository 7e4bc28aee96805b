"""FDSA (Zhang et al., IJCAI 2019): one encoder over items, one over their features, here intents; joined by a linear layer.

    R = [R^v; R^c] W + b

The intents serve the items: nothing is learned from which intent comes next, nor is it scored (CAFE's points 2 and 4). An item has one
intent, so the paper's attention over several features has nothing to weigh. `Fused` gives the same to any encoder of items: BERT-F and
LOCKER-F are BERT4Rec and LOCKER with it, as the CAFE paper extends them.
"""

import torch
from torch import Tensor, nn

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Tokens
from cafe.models.bert4rec import BERT4Rec
from cafe.models.blocks import embedding_table
from cafe.models.locker import LOCKER
from cafe.models.sasrec import SASRec


class Fused(SASRec):
    """A model of items that reads the intents beside them."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.intent_embedding = embedding_table(self.num_intents, config)
        self.intent_encoder = self.make_encoder()
        self.fusion = nn.Linear(2 * config.dim, config.dim)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        items, _ = super().encode(tokens)
        intents = self.intent_encoder(self.read_intents(tokens), tokens, stream=2 * tokens.step + 1)
        return self.fusion(torch.cat([items, intents], 1)), None


class FDSA(Fused):
    pass


class BERTF(Fused, BERT4Rec):
    pass


class LOCKERF(Fused, LOCKER):
    pass
