"""rpe_tvm for PyTorch: the functions, the layers, the feature maps and the biases."""

from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.bias import ALiBiBias, DecayBias, KerpleLogBias, KerplePowerBias, LearnedBias, LearnedBias2d, T5Bias
from rpe_tvm.torch.class_token import class_token_attention
from rpe_tvm.torch.core import toeplitz_attention
from rpe_tvm.torch.dispatch import describe, get_operator, use_artefacts
from rpe_tvm.torch.fastrpb import FastRPB, FastRPB2d
from rpe_tvm.torch.feature_maps import (
    NPRF,
    PRF,
    RFA,
    T2R,
    TRF,
    FeatureMap,
    elu_features,
    make_feature_map,
    relu_features,
    sikf_features,
)
from rpe_tvm.torch.grid import grid_attention, grid_toeplitz_matmul
from rpe_tvm.torch.module import KernelizedAttention
from rpe_tvm.torch.multihead import MultiheadKernelizedAttention
from rpe_tvm.torch.projection import gaussian_projection, orthogonal_projection, sphere_projection
from rpe_tvm.torch.toeplitz import toeplitz_matmul

__all__ = [
    "ALiBiBias",
    "DecayBias",
    "FastRPB",
    "FastRPB2d",
    "FeatureMap",
    "KernelizedAttention",
    "KerpleLogBias",
    "KerplePowerBias",
    "LearnedBias",
    "LearnedBias2d",
    "MultiheadKernelizedAttention",
    "NPRF",
    "PRF",
    "RFA",
    "T2R",
    "T5Bias",
    "TRF",
    "class_token_attention",
    "describe",
    "elu_features",
    "gaussian_projection",
    "get_operator",
    "grid_attention",
    "grid_toeplitz_matmul",
    "kernelized_attention",
    "make_feature_map",
    "orthogonal_projection",
    "relu_features",
    "sikf_features",
    "sphere_projection",
    "toeplitz_attention",
    "toeplitz_matmul",
    "use_artefacts",
]
