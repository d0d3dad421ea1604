"""Fused ops for libraries: public functions here, which check their arguments, and `torch.ops.adaptlora.*`, which trust the caller."""

from .compose import compose, compose_ref
from .lora_delta import lora_delta_, lora_delta_ref
from .lora_group import lora_group, lora_group_ref
from .lora_linear import lora_linear, lora_linear_ref
from .low_rank_svd import SVD, low_rank_svd, low_rank_svd_ref
from .randomized_svd import RandomizedSVD, randomized_svd, randomized_svd_ref
from .rank_gather import rank_gather, rank_gather_ref
from .rank_norms import rank_norms, rank_norms_ref
from .rank_penalty import rank_penalty, rank_penalty_ref
from .rank_shrink import rank_shrink_, rank_shrink_ref
from .subspace_overlap import subspace_overlap, subspace_overlap_ref

__all__ = [
    "SVD",
    "RandomizedSVD",
    "compose",
    "compose_ref",
    "lora_delta_",
    "lora_delta_ref",
    "lora_group",
    "lora_group_ref",
    "lora_linear",
    "lora_linear_ref",
    "low_rank_svd",
    "low_rank_svd_ref",
    "randomized_svd",
    "randomized_svd_ref",
    "rank_gather",
    "rank_gather_ref",
    "rank_norms",
    "rank_norms_ref",
    "rank_penalty",
    "rank_penalty_ref",
    "rank_shrink_",
    "rank_shrink_ref",
    "subspace_overlap",
    "subspace_overlap_ref",
]
