"""Ops and modules of CAFE that know nothing of recommender data."""

from cafe_kernels.attention import DistanceMaskedAttention, distance_attention
from cafe_kernels.sampling import AliasSampler
from cafe_kernels.topk import TopKIndex, joint_topk, topk_inner_product

__all__ = [
    "AliasSampler",
    "DistanceMaskedAttention",
    "TopKIndex",
    "distance_attention",
    "joint_topk",
    "topk_inner_product",
]
