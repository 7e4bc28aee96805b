"""SSE-PT (Wu et al., RecSys 2020): SASRec that reads the user, too, regularised by stochastic shared embeddings.

Every token is the concatenation [E_v; U_u]; in training a user is replaced by a random one with a high probability, an item with a low
one (SSE; cafe.batches), so that users share what they learn. Left open by the paper or changed here: an item keeps its full width d, the
user's width is `user_dim` and the encoder's the sum of both; the paper scores by F . [E_v; U_u], whose second part is the same for
all candidates: it is left out. Items that are scored are not replaced. A history without a known user has the mean user.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Batch, Tokens
from cafe.models.blocks import Encoder
from cafe.models.sasrec import SASRec


class SSEPT(SASRec):
    personal = True

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.user_embedding = nn.Parameter(torch.randn(dataset.num_users, config.user_dim).mul_(config.init_std))
        self.item_encoder = Encoder(replace(config, dim=config.dim + config.user_dim))

    def read(self, tokens: Tokens) -> Tensor:
        items = self.embed(tokens.items)
        if tokens.users is None:
            users = self.user_embedding.mean(0).expand(len(items), -1)
        else:
            known = embedding(tokens.users.clamp(min=0), self.user_embedding, sparse=True)
            if not self.training:
                known = torch.where(tokens.users[:, None] < 0, self.user_embedding.mean(0), known)
            users = known[tokens.sequence]
        return torch.cat([items, users], 1)

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        state, intent = super().encode(tokens)
        return state[:, : self.config.dim], intent

    def tables(self) -> list[nn.Parameter]:
        return [*super().tables(), self.user_embedding]

    def rows_read(self, batch: Batch) -> list[Tensor]:
        assert batch.users is not None
        return [*super().rows_read(batch), batch.users]
