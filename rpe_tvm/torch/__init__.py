"""rpe_tvm for PyTorch: the function, the layers and the feature maps."""

from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.dispatch import describe, get_operator, use_artefacts
from rpe_tvm.torch.module import KernelizedAttention
from rpe_tvm.torch.multihead import MultiheadKernelizedAttention
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
    "FeatureMap",
    "KernelizedAttention",
    "MultiheadKernelizedAttention",
    "describe",
    "gaussian_projection",
    "get_operator",
    "kernelized_attention",
    "make_feature_map",
    "orthogonal_projection",
    "use_artefacts",
]
