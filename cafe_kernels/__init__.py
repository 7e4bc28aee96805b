"""Ops and modules of CAFE that know nothing of recommender data."""

from cafe_kernels.attention import DistanceMaskedAttention, distance_attention
from cafe_kernels.losses import gbce, sampled_bce, sampled_softmax
from cafe_kernels.optim import RowSparseAdam
from cafe_kernels.sampling import AliasSampler

__all__ = [
    "AliasSampler",
    "DistanceMaskedAttention",
    "RowSparseAdam",
    "distance_attention",
    "gbce",
    "sampled_bce",
    "sampled_softmax",
]
