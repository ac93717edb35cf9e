"""rpe_tvm for PyTorch: the function, the layer and the feature maps."""

from rpe_tvm.torch.attention import kernelized_attention
from rpe_tvm.torch.dispatch import describe, get_operator, use_artefacts
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
from rpe_tvm.torch.module import KernelizedAttention
from rpe_tvm.torch.projection import gaussian_projection, orthogonal_projection, sphere_projection

__all__ = [
    "NPRF",
    "PRF",
    "RFA",
    "T2R",
    "TRF",
    "FeatureMap",
    "KernelizedAttention",
    "describe",
    "elu_features",
    "gaussian_projection",
    "get_operator",
    "kernelized_attention",
    "make_feature_map",
    "orthogonal_projection",
    "relu_features",
    "sikf_features",
    "sphere_projection",
    "use_artefacts",
]
