"""LOCKER (He et al., CIKM 2021): BERT4Rec, some of whose heads look near by.

A local head's weights are softmax_j(w_ij + ln sigma_ij), the other heads' are plain. By `config.local`, ln sigma_ij is

    window    0 where |i - j| <= local_width, else -inf
    initial   a learned b[i - j], at first -(i - j)^2 / (2 local_width^2)
    adapt     (V_i + V_j + D[i - j]) . W_L + b_L, which CAFE took up in Eq. 6

The paper's other local encoders, a short recurrence and a convolution, are no attention and left out, as is its choice of the user's
dynamics as an input of `adapt`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cafe.config import Config
from cafe.models.bert4rec import BERT4Rec
from cafe.models.blocks import Encoder, make_attention
from cafe_kernels import DistanceMaskedAttention


class LOCKER(BERT4Rec):
    def make_encoder(self) -> Encoder:
        config = self.config
        options: dict[str, Any] = {"causal": False}
        if config.local == "adapt":
            options |= {"max_distance": config.max_len, "local_heads": config.local_heads, "mask_reads": "values"}
        else:
            options |= {"kind": partial(ByDistance, curve=curve(config), local_heads=config.local_heads)}
        return Encoder(config, partial(make_attention, **options))


def curve(config: Config) -> nn.Parameter:
    """ln sigma by distance at first, (2 n - 1)."""
    distance = torch.arange(1 - config.max_len, config.max_len).float()
    if config.local == "initial":
        return nn.Parameter(-(distance**2) / (2 * config.local_width**2))
    return nn.Parameter(torch.zeros_like(distance).masked_fill(distance.abs() > config.local_width, -torch.inf), False)


class ByDistance(DistanceMaskedAttention):
    """Local heads whose ln sigma is a table by distance; the others have 0."""

    def __init__(self, *args: Any, curve: nn.Parameter, local_heads: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.curve = nn.Parameter(curve.detach().repeat(local_heads, 1), curve.requires_grad)

    def log_theta(self) -> Tensor:
        return nn.functional.pad(self.curve, (0, 0, 0, self.num_heads - len(self.curve)))
