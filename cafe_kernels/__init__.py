"""Ops and modules of CAFE that know nothing of recommender data."""

from cafe_kernels.attention import DistanceMaskedAttention, distance_attention
from cafe_kernels.losses import gbce, sampled_bce, sampled_softmax
from cafe_kernels.optim import RowSparseAdam
from cafe_kernels.sampling import AliasSampler
from cafe_kernels.topk import TopK, TopKIndex, joint_topk, topk_inner_product

__all__ = [
    "AliasSampler",
    "DistanceMaskedAttention",
    "RowSparseAdam",
    "TopK",
    "TopKIndex",
    "distance_attention",
    "gbce",
    "joint_topk",
    "sampled_bce",
    "sampled_softmax",
    "topk_inner_product",
]
