"""Ops and modules of CAFE that know nothing of recommender data."""

from cafe_kernels.attention import DistanceMaskedAttention, distance_attention
from cafe_kernels.sampling import AliasSampler

__all__ = ["AliasSampler", "DistanceMaskedAttention", "distance_attention"]
