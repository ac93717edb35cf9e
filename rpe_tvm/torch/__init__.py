"""rpe_tvm for PyTorch: the function, the layer and the feature maps."""

from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.dispatch import describe, get_operator, use_artefacts
from rpe_tvm.torch.fastrpb import FastRPB, FastRPB2d
from rpe_tvm.torch.module import KernelizedAttention
from rpe_tvm.torch.projection import (
    NPRF,
    PRF,
    FeatureMap,
    gaussian_projection,
    make_feature_map,
    orthogonal_projection,
)
from rpe_tvm.torch.toeplitz import grid_toeplitz_matmul, toeplitz_matmul

__all__ = [
    "NPRF",
    "PRF",
    "FastRPB",
    "FastRPB2d",
    "FeatureMap",
    "KernelizedAttention",
    "describe",
    "gaussian_projection",
    "get_operator",
    "grid_toeplitz_matmul",
    "kernelized_attention",
    "make_feature_map",
    "orthogonal_projection",
    "toeplitz_matmul",
    "use_artefacts",
]
