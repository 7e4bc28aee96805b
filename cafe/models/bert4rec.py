"""BERT4Rec (Sun et al., CIKM 2019): bidirectional attention, trained to name hidden items (a cloze).

Training hides a share of a sequence's items behind one learned embedding and asks for them (cafe.batches); to recommend, a hidden
item is put behind the history. Left open by the paper or changed here: blocks are SASRec's of this library (pre-norm, ReLU, inner width
d) and not BERT's; items are scored by E itself, without the extra layer and biases; a share `mask_last` of training sequences hides the
last item only, where the paper's code repeats each sequence once so.
"""

import torch
from torch import Tensor, nn

from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.models.base import Tokens
from cafe.models.blocks import hide
from cafe.models.sasrec import SASRec


class BERT4Rec(SASRec):
    cloze = True
    causal = False

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.hidden_embedding = nn.Parameter(torch.randn(config.dim).mul_(config.init_std))

    def read(self, tokens: Tokens) -> Tensor:
        return hide(self.embed(tokens.items), tokens, self.hidden_embedding)

    def history(self, items: Tensor, cu_seqlens: Tensor, users: Tensor | None = None) -> Tokens:
        """The histories' newest n - 1 items each, and behind them the hidden one."""
        tokens = super().history(items, cu_seqlens, users)
        room = self.config.max_len - 1
        lengths = cu_seqlens.diff().clamp(max=room)
        # Each row's kept items end where its history ends; its hidden item reads any, here the newest.
        ends = torch.cat([cu_seqlens.new_zeros(1), (lengths + 1).cumsum(0)]).int()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=items.device), lengths.long() + 1)
        behind = ends.long()[sequence + 1] - 1 - torch.arange(len(sequence), device=items.device)
        source = cu_seqlens.long()[sequence + 1] - behind.clamp(min=1)
        longest = min(tokens.max_seqlen, room) + 1
        return Tokens(
            items=items[source],
            cu_seqlens=ends,
            max_seqlen=longest,
            sequence=sequence,
            targets=ends[1:].long() - 1,
            users=users,
        )
