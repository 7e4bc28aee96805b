"""NOVA (Liu et al., AAAI 2021): side information steers the attention and never enters what it carries.

    NOVA(R, F) = softmax(F W_Q (F W_K)^T / sqrt(d)) R W_V,   F = R + positions + intents    (its "add" fusor), in every layer

on BERT4Rec. Left open by the paper or changed here: of its three fusors the sum; R is the normalised input of the block.
"""

from torch import Tensor

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Tokens
from cafe.models.bert4rec import BERT4Rec
from cafe.models.blocks import embedding_table


class NOVA(BERT4Rec):
    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.intent_embedding = embedding_table(self.num_intents, config)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        side = self.read_intents(tokens)
        return self.item_encoder(self.read(tokens), tokens, stream=2 * tokens.step, side=side), None
