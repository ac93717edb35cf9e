"""Schedule of the gradients of feature maps, shared by CPUs."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.split import split_of
from rpe_tvm.schedules.cpu import at_consumer, largest_divisor, vectorize
from rpe_tvm.te.features import FeatureMap

# positions of one task
ROWS = 64


def features_backward(sch: Schedule, config: AttentionConfig, feature_map: FeatureMap) -> None:
    """Schedule `te.features_backward`: parallel over tiles of positions, one position after the other."""
    exponent = sch.get_sblock("grad_exponent")
    b, h, position, feature = sch.get_loops(exponent)
    if config.algorithm == "fft":
        # a few whole rows of the buffer, which are read in one go for each feature
        split = split_of(config)
        s, q, row = sch.split(position, [split.s, split.q, split.n2])
        outer, row = sch.split(row, [None, largest_divisor(split.n2, max(1, 2 * ROWS // split.n1))])
        sch.reorder(b, h, outer, feature, row, q, s)
        sch.vectorize(s)
        sch.parallel(sch.fuse(b, h, outer))
    else:
        outer, inner = sch.split(position, [None, ROWS])
        sch.reorder(b, h, outer, feature, inner)
        sch.parallel(sch.fuse(b, h, outer))

    grad_x = sch.get_sblock("grad_x")
    b, h, i, channel = sch.get_loops(grad_x)
    outer, row = sch.split(i, [None, ROWS])
    sch.parallel(sch.fuse(b, h, outer))
    sch.vectorize(sch.split(channel, [None, config.lanes])[1])
    of_direction = ("sums", "lane_sums") if feature_map == "nprf" else ()
    for name in ("total", "scale", *of_direction, "along"):
        at_consumer(sch, sch.get_sblock(name), row)
    along = sch.get_sblock("along")
    vector, lane, feature = sch.get_loops(along)[-3:]
    sch.reorder(feature, vector, lane)
    vectorize(sch, along, unrolled=1)
    vectorize(sch, sch.decompose_reduction(along, feature), unrolled=1)
    if feature_map == "nprf":
        lane_sums = sch.get_sblock("lane_sums")
        which, lane, part = sch.get_loops(lane_sums)[-3:]
        sch.reorder(part, which, lane)
        vectorize(sch, lane_sums, unrolled=1)
        vectorize(sch, sch.decompose_reduction(lane_sums, part), unrolled=1)
