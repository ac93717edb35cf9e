"""rpe_tvm for PyTorch: the functions, the layer, the feature maps and the biases."""

from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.bias import (
    ALiBiBias,
    DecayBias,
    KerpleLogBias,
    KerplePowerBias,
    LearnedBias,
    LearnedBias2d,
    T5Bias,
)
from rpe_tvm.torch.class_token import class_token_attention
from rpe_tvm.torch.dispatch import describe, get_operator, use_artefacts
from rpe_tvm.torch.grid import grid_attention, grid_toeplitz_matmul
from rpe_tvm.torch.module import KernelizedAttention
from rpe_tvm.torch.projection import (
    NPRF,
    PRF,
    FeatureMap,
    gaussian_projection,
    make_feature_map,
    orthogonal_projection,
)

__all__ = [
    "NPRF",
    "PRF",
    "ALiBiBias",
    "DecayBias",
    "FeatureMap",
    "KernelizedAttention",
    "KerpleLogBias",
    "KerplePowerBias",
    "LearnedBias",
    "LearnedBias2d",
    "T5Bias",
    "class_token_attention",
    "describe",
    "gaussian_projection",
    "get_operator",
    "grid_attention",
    "grid_toeplitz_matmul",
    "kernelized_attention",
    "make_feature_map",
    "orthogonal_projection",
    "use_artefacts",
]
