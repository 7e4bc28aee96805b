"""SASRec (Kang & McAuley 2018) on packed sequences: one causal encoder over items, tied embeddings. CAFE's backbone (Eq. 1-3).

Items are scored by R_t . E_v, or, with `config.cosine`, by a learned scale times the cosine of both: then a popular item cannot score high
by the length of its embedding alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Batch, Model, Scores, Tokens, Weights
from cafe.models.blocks import Encoder, embedding_table, hide, last_tokens, make_attention
from cafe_kernels import TopKIndex
from cafe_kernels.losses import sampled_bce, sampled_softmax

ROWS = 1 << 16
EPS = 1e-12  # of `normalize`


class SASRec(Model):
    """One item encoder."""

    mask = False  # SASRec's attention has theta = 1
    causal = True
    intent_embedding: Tensor
    trust: Tensor

    def __init__(self, config: Config, dataset: Dataset, rows: range | None = None) -> None:
        """rows: of the item table these alone, which then have to be looked up elsewhere (cafe.distributed)."""
        super().__init__(config, dataset)
        self.item_embedding = embedding_table(self.num_items, config, rows)
        if config.compose_items:
            self.item_intent_embedding = embedding_table(self.num_intents, config)
        if config.shrinkage:
            counts = torch.from_numpy(dataset.train_counts()).double()
            self.register_buffer("trust", (counts / (counts + config.shrinkage)).float(), persistent=False)
        if config.cosine:
            self.scale = nn.Parameter(torch.tensor(config.cosine))
        self.item_encoder = self.make_encoder()

    def make_encoder(self) -> Encoder:
        """An encoder over items, or of the same kind over intents."""
        longest = self.config.max_len if self.mask and self.config.distance_mask else None
        return Encoder(self.config, partial(make_attention, max_distance=longest, causal=self.causal))

    def embed(self, items: Tensor) -> Tensor:
        """E_v of `items`, (*items.shape, d): an item's own row, shrunk, plus that of its intent where items are composed."""
        rows = nn.functional.embedding(items, self.item_embedding, sparse=True)
        if self.config.shrinkage:
            rows = rows * self.trust[items].unsqueeze(-1)
        if self.config.compose_items:
            rows = rows + nn.functional.embedding(self.item_intent[items], self.item_intent_embedding)
        return rows

    def query(self, state: Tensor) -> Tensor:
        """What items are searched by, (T, d), from R."""
        return self.scale * normalize(state, dim=-1) if self.config.cosine else state

    def keys(self, items: Tensor) -> Tensor:
        """What `query` is multiplied by to score `items`, (*items.shape, d)."""
        return normalize(self.embed(items), dim=-1) if self.config.cosine else self.embed(items)

    def read(self, tokens: Tokens) -> Tensor:
        """The item encoder's input, (T, d)."""
        return self.embed(tokens.items)

    def read_intents(self, tokens: Tokens) -> Tensor:
        """The intents' embeddings, (T, d), of a model that has `intent_embedding`; zero where the item is hidden."""
        intents = nn.functional.embedding(self.item_intent[tokens.items], self.intent_embedding)
        return hide(intents, tokens, intents.new_zeros(intents.shape[1]))

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """R (T, d) for items and R^c (T, d) for intents, or None."""
        return self.item_encoder(self.read(tokens), tokens, stream=2 * tokens.step), None

    def loss(self, batch: Batch) -> Tensor:
        return self.item_loss(self.encode(batch)[0], batch)

    def item_loss(self, state: Tensor, batch: Batch) -> Tensor:
        """BCE (Eq. 9) or softmax, sampled with log-Q correction or over all items; state (T, d)."""
        sequence = batch.sequence
        if batch.targets is not None:
            state, sequence = state[batch.targets], sequence[batch.targets]
        state, positives, negatives = self.query(state), batch.positives, batch.negatives
        table: Tensor = self.item_embedding
        options: dict[str, Any] = {
            "ignore": batch.ignore,
            "sequence": None if batch.ignore is None else sequence,
            "sparse_grad": True,
        }
        if self.config.cosine or self.config.shrinkage:  # what the batch's items are scored by is a table of its own
            options["sparse_grad"] = False
            items = torch.cat([positives, negatives.flatten()])
            place = items.new_empty(len(self.item_embedding))  # not torch.unique, for which a GPU waits
            place[items] = torch.arange(len(items), device=items.device)
            table, positives, negatives = self.keys(items), place[positives], place[negatives]
        elif self.config.compose_items:
            options["compose"] = self.item_intent_embedding, self.item_intent
        if self.config.loss == "bce":
            return sampled_bce(state, table, positives, negatives, **options)
        if batch.positive_log_q is not None and batch.negative_log_q is not None:
            options["log_q"] = batch.positive_log_q, batch.negative_log_q
        return sampled_softmax(state, table, positives, negatives, **options)

    def tables(self) -> list[nn.Parameter]:
        return [self.item_embedding]

    def rows_read(self, batch: Batch) -> list[Tensor]:
        return [torch.cat([batch.items, batch.positives, batch.negatives.flatten()])]

    def history(self, items: Tensor, cu_seqlens: Tensor, users: Tensor | None = None) -> Tokens:
        """Packed histories as `encode` reads them to tell what comes next; none may be empty (ValueError)."""
        lengths = cu_seqlens.diff().long()
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError("a history is empty: there is nothing to encode; recommend popular items instead")
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=items.device), lengths)
        longest = int(lengths.max()) if len(lengths) else 0
        return Tokens(items=items, cu_seqlens=cu_seqlens, max_seqlen=longest, sequence=sequence, users=users)

    def states(self, items: Tensor, cu_seqlens: Tensor, users: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """After the newest item of each history, what items are searched by (`query`), and R^c; (B, d) each."""
        tokens = self.history(items, cu_seqlens, users)
        item, intent = self.encode(tokens)
        last = last_tokens(tokens.cu_seqlens)
        return self.query(item[last]), None if intent is None else intent[last]

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Scores:
        state, intent_state = self.states(items, cu_seqlens, users)
        if candidates is None:
            item = state @ self.item_embedding.T
            if self.config.shrinkage:
                item *= self.trust
            if self.config.compose_items:  # R . (E_v + E_c) by its two parts: no second table is made
                item += (state @ self.item_intent_embedding.T)[:, self.item_intent]
            if self.config.cosine:
                item /= torch.cat([self.embed(some).norm(dim=-1).clamp(min=EPS) for some in self.catalog()])
        else:
            item = (self.keys(candidates) @ state.unsqueeze(-1)).squeeze(-1)
        intent = None if intent_state is None else self.intent_logits(intent_state)
        if intent is not None and candidates is not None:
            intent = intent.gather(1, self.item_intent[candidates] if candidate_intents is None else candidate_intents)
        return Scores(item, intent)

    def catalog(self) -> tuple[Tensor, ...]:
        """All items in parts of ROWS, so that what is made of them is made once and not three times."""
        return torch.arange(self.num_items, device=self.item_embedding.device).split(ROWS)

    def index(self) -> TopKIndex:
        """The items as they are now, to be searched with `index_query` and the scores of `joint_terms`."""
        table: Tensor | None = None
        with torch.no_grad():
            for start, some in zip(range(0, self.num_items, ROWS), self.catalog(), strict=True):
                rows = self.index_keys(some)
                if table is None:
                    table = rows.new_empty(self.num_items, rows.shape[1], dtype=torch.float32)
                table[start : start + len(rows)] = rows
        assert table is not None
        return TopKIndex(table, self.item_intent, self.num_intents)

    def index_keys(self, items: Tensor) -> Tensor:
        """The rows of `items` in the index."""
        return self.keys(items)

    def index_query(self, query: Tensor, weights: Weights | None = None) -> Tensor:
        """What the index is searched by, from `states`; `weights` as for `join`."""
        return query

    def joint_terms(
        self, intent_logits: Tensor | None, weights: Weights | None = None, protocol: str = "full"
    ) -> tuple[Tensor | None, str]:
        """What each intent adds to the joint score, (B, C), and what is taken of an item's own score: see `join` and TopKIndex."""
        return None, "identity"

    def intent_logits(self, intent_state: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no intents")
