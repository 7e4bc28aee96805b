"""A catalog whose item table is spread over the ranks of torch.distributed, as cafe.distributed trains and cafe.evaluate sees it.

Row v of the table is with rank v // ceil(V / ranks): TorchRec's row-wise sharding, which also takes ids and rows to their ranks and
gradients back. TorchRec's own kernels for a shard have either a dense gradient as large as the shard or an optimizer that leaves rows
without a gradient alone, which is not Adam; hence its lookup is replaced by `Lookup`, and RowSparseAdam moves the shard.
"""

import logging
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from cafe.models.base import Model, Scores
from cafe.models.blocks import ROWS
from cafe.shards import TABLE
from cafe.train import PER_ITEM
from cafe_kernels import TopK, TopKIndex
from cafe_kernels.topk.reference import exclusion_pairs

LIFT = 64.0  # log sigma(LIFT) adds nothing to a score, in float32
MISSING = "cafe.distributed needs torchrec and FBGEMM, which are not installed ({}): docs/scale.md says how"


class Lookup(nn.Module):
    """In place of TorchRec's kernel: of the rank's rows (n, d) those that ranks ask for, as a leaf that gathers their gradient."""

    def __init__(self, shard: nn.Parameter) -> None:
        super().__init__()
        self.shard = [shard]  # not as a parameter of this module
        self.ids = self.rows = torch.empty(0)

    def forward(self, features: Any) -> Tensor:
        self.ids = features.values()
        self.rows = self.shard[0].detach()[self.ids].requires_grad_(torch.is_grad_enabled())
        return self.rows


class ShardedTable:
    """A (V, d) table of which every rank holds a range of rows; `fetch` is called by all ranks together.

    shard: this rank's rows, `first` to `stop` - 1."""

    def __init__(self, num_rows: int, dim: int, device: torch.device) -> None:
        try:
            from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
            from torchrec.distributed.comm_ops import set_gradient_division
            from torchrec.distributed.embedding import ShardedEmbeddingCollection
            from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
            from torchrec.distributed.types import ShardingEnv
        except (ImportError, OSError) as missing:
            raise ValueError(MISSING.format(missing)) from None
        for noisy in ("torch.fx._symbolic_trace", "torchrec.distributed.utils"):  # hints to TorchRec's authors
            logging.getLogger(noisy).setLevel(logging.ERROR)
        set_gradient_division(False)  # the losses are weighted: gradients are sums
        config = EmbeddingConfig(name=TABLE, embedding_dim=dim, num_embeddings=num_rows, feature_names=["item"])
        whole = EmbeddingCollection(device=torch.device("meta"), tables=[config])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        plan = construct_module_sharding_plan(
            whole, {TABLE: row_wise(compute_kernel="dense")}, local_size=local, device_type=device.type
        )
        environment = ShardingEnv.from_process_group(dist.group.WORLD)
        self.collection = ShardedEmbeddingCollection(whole, plan, environment, device=device)
        weights = self.collection._lookups[0]._emb_modules[0].emb_module.weights.detach()
        self.shard = nn.Parameter(weights.view(-1, dim))
        self.lookup = self.collection._lookups[0] = Lookup(self.shard)
        (self.first, _), (rows, _) = (
            getattr(plan[TABLE].sharding_spec.shards[dist.get_rank()], name)
            for name in ("shard_offsets", "shard_sizes")
        )
        self.stop, self.num_rows, self.features, self.device = self.first + rows, num_rows, KeyedJaggedTensor, device

    def fetch(self, ids: Tensor, catch_up: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """Rows `ids`, int64 (n,), of whichever rank has them: (n, d). Where gradients are on, backward() takes the gradient to their
        owners, for `gather_gradient`. catch_up(shard, local ids) brings the rows up to date first."""
        ids = ids.to(self.device, non_blocking=True)
        asked = self.features(keys=["item"], values=ids, lengths=torch.tensor([len(ids)], device=self.device))
        context = self.collection.create_context()
        received = self.collection.input_dist(context, asked).wait().wait()
        if catch_up is not None:
            catch_up(self.shard, received[0].values())
        return self.collection.compute_and_output_dist(context, received).wait()["item"].values()

    def gather_gradient(self) -> None:
        """What the ranks' backward() sent becomes shard.grad, sparse; a row that several asked for is there several times."""
        ids, rows = self.lookup.ids, self.lookup.rows
        values = torch.zeros_like(rows) if rows.grad is None else rows.grad
        self.shard.grad = torch.sparse_coo_tensor(ids[None], values, self.shard.shape, check_invariants=False)


class Sharded(nn.Module):
    """A model whose item table is a ShardedTable, as `train_step` and cafe.evaluate see it; what is not here is the model's.

    All ranks call `states`, `score` and `index` together, with the same arguments: each encodes and scores its share of the
    histories, and has the results of all."""

    sharded = True

    def __init__(self, model: Model, table: ShardedTable) -> None:
        super().__init__()
        self.model, self.table = model, table

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.model, method)(*arguments)

    def on_rows(self, ids: Tensor, rows: Tensor, method: str, *arguments: Any) -> Any:
        """A method of the model for which the catalog is the items `ids`, whose rows of the table are `rows` and whose numbers are
        0 ... len(ids) - 1."""
        per_item = {name: getattr(self.model, name)[ids] for name in (*PER_ITEM, "prior") if hasattr(self.model, name)}
        lent = {f"model.{name}": tensor for name, tensor in {TABLE: rows, **per_item}.items()}
        return functional_call(self, lent, (method, *arguments))

    def states(self, items: Tensor, cu_seqlens: Tensor, users: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self._share("states", items, cu_seqlens)

    def score(
        self,
        items: Tensor,
        cu_seqlens: Tensor,
        candidates: Tensor | None = None,
        candidate_intents: Tensor | None = None,
        users: Tensor | None = None,
    ) -> Scores:
        if candidates is None:
            raise ValueError("the scores of a sharded catalog are in no one place: rank it by `index`")
        intents = self.model.item_intent[candidates] if candidate_intents is None else candidate_intents
        return Scores(*self._share("score", items, cu_seqlens, candidates, intents))

    def _share(self, method: str, items: Tensor, cu_seqlens: Tensor, *of_users: Tensor) -> Any:
        """`method` of this rank's share of the histories; the results of all. The first of `of_users` are items."""
        rank, ranks, count = dist.get_rank(), dist.get_world_size(), len(cu_seqlens) - 1
        borders = [count * r // ranks for r in range(ranks + 1)]
        start, stop = borders[rank : rank + 2]
        mine = slice(start, stop) if start < stop else slice(0, 1)  # somebody, who is then left out
        cu = cu_seqlens[mine.start : mine.stop + 1]
        read = [items[int(cu[0]) : int(cu[-1])], *(x[mine] for x in of_users[:1])]
        ids, place = torch.unique(torch.cat([x.flatten() for x in read]), return_inverse=True)
        history, *candidates = (
            part.view(x.shape) for part, x in zip(place.split([x.numel() for x in read]), read, strict=True)
        )
        rows, others = self.table.fetch(ids), [x[mine] for x in of_users[1:]]
        found = self.on_rows(ids, rows, method, history, cu - cu[0], *candidates, *others)
        return tuple(None if x is None else gather(x[: stop - start], borders) for x in found)

    def index(self) -> "ShardedIndex":
        """The items as they are now, searched as SASRec.index is."""
        table, keys = self.table, torch.empty(0)
        for ids in torch.arange(table.first, table.stop, device=table.device).split(ROWS):
            here = ids - table.first
            some = self.index_keys(ids, table.shard.detach()[here])
            if not len(keys):  # as large as the shard, so made once
                keys = some.new_empty(len(table.shard) + 1, some.shape[1] + 1)
            keys[here, :-1] = some
        intents = self.model.item_intent[table.first : table.stop]
        return ShardedIndex(
            keys, intents, self.model.num_intents, table.first,
            lambda ids: (self.index_keys(ids, table.fetch(ids)), self.model.item_intent[ids]),
        )  # fmt: skip

    def index_keys(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self.on_rows(ids, rows, "index_keys", torch.arange(len(ids), device=ids.device))


class ShardedIndex:
    """TopKIndex over the rows of all ranks: each searches its own, and what it finds is merged, so the answers are as exact.

    All ranks call `search` and `count_above` together, with the same arguments, and have the same answers. On each rank the index
    has one more item, of an intent of its own, that scores as the caller says: for counting, what the answer scores.

    Args:
        keys: (n + 1, d + 1), of this rank's n items, which are `first` and those after it, with room for that item, written here.
        item_intent: (n,), of these items.
        keys_and_intents: of any items, wherever they are; needed for count_above.
    """

    def __init__(
        self,
        keys: Tensor,
        item_intent: Tensor,
        num_intents: int,
        first: int,
        keys_and_intents: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.first, self.size, self.num_intents, self.keys_and_intents = (
            first,
            len(item_intent),
            num_intents,
            keys_and_intents,
        )
        keys[-1], keys[:, -1] = 0.0, 0.0
        keys[-1, -1] = LIFT
        self.local = TopKIndex(keys, nn.functional.pad(item_intent, (0, 1), value=num_intents), num_intents + 1)

    def _query(
        self, user: Tensor, intent_scores: Tensor | None, join: str, extra: Tensor
    ) -> tuple[Tensor, Tensor, str]:
        """The arguments of the local index, where the item more scores `extra` (B,)."""
        if intent_scores is None:
            intent_scores = user.new_zeros(len(user), self.num_intents)
        user = nn.functional.pad(user, (0, 1), value=0.0 if join == "identity" else 1.0)
        return user, torch.cat([intent_scores, extra[:, None]], 1), join

    def _excluded(self, exclude: tuple[Tensor, Tensor] | None, also: Tensor) -> tuple[Tensor, Tensor]:
        """`exclude` of the whole catalog as the local index has it, and an item more for each user, `also` (B,), if it is here."""
        rows, items = exclusion_pairs(exclude, len(also))
        rows = torch.cat([rows, torch.arange(len(also))])
        items = torch.cat([items - self.first, also.cpu()])
        here = (items >= 0) & (items <= self.size)  # the item more is never found, and never counts
        rows, order = rows[here].sort(stable=True)
        return torch.searchsorted(rows, torch.arange(len(also) + 1)), items[here][order]

    def search(
        self,
        user: Tensor,
        k: int,
        intent_scores: Tensor | None = None,
        *,
        join: str = "identity",
        exclude: tuple[Tensor, Tensor] | None = None,
    ) -> TopK:
        """As TopKIndex.search."""
        query = self._query(user, intent_scores, join, user.new_zeros(len(user)))
        without = self._excluded(exclude, torch.full((len(user),), self.size))
        found = self.local.search(query[0], k, query[1], join=join, exclude=without)
        items, scores = found.items + self.first * (found.items >= 0), found.scores
        missing = k - items.shape[1]
        items, scores = (
            nn.functional.pad(items, (0, missing), value=-1),
            nn.functional.pad(scores, (0, missing), value=-torch.inf),
        )
        everyones = [gather(x.T.contiguous()).T for x in (items, scores)]
        # Ranks hold ascending items, so among equal scores a stable sort keeps the smaller item first.
        best = everyones[1].sort(dim=1, descending=True, stable=True).indices[:, :k]
        return TopK(everyones[0].gather(1, best), everyones[1].gather(1, best), found.scored, found.exact)

    def count_above(
        self,
        user: Tensor,
        answers: Tensor,
        intent_scores: Tensor | None = None,
        *,
        join: str = "identity",
        exclude: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As TopKIndex.count_above."""
        assert self.keys_and_intents is not None
        keys, intents = self.keys_and_intents(answers)
        everyone = torch.arange(len(user))
        others = everyone.expand(len(user), -1)[~torch.eye(len(user), dtype=torch.bool)]
        but_one = torch.arange(len(user) + 1) * (len(user) - 1), others
        own = (
            TopKIndex(keys, intents, self.num_intents)
            .search(user, 1, intent_scores, join=join, exclude=but_one)
            .scores[:, 0]
        )
        query = self._query(user, intent_scores, join, own)
        without = self._excluded(exclude, answers.cpu() - self.first)
        same = torch.full((len(user),), self.size, device=user.device)
        counts = self.local.count_above(query[0], same, query[1], join=join, exclude=without)
        dist.all_reduce(counts)
        return counts


def gather(mine: Tensor, borders: Sequence[int] | None = None) -> Tensor:
    """The rows of all ranks, one after the other, on every rank; borders: where each rank's begin, if they are not equally many."""
    ranks = dist.get_world_size()
    sizes = [len(mine)] * ranks if borders is None else [b - a for a, b in pairwise(borders)]
    padded = mine.new_zeros(max(sizes), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
