"""Schedule of the gradients of feature maps, shared by CPUs."""

from __future__ import annotations

from tvm.s_tir import Schedule

from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.plan.twiddles import BLOCK
from rpe_tvm.schedules.cpu import at_consumer, largest_divisor, vectorize
from rpe_tvm.te.features import FeatureMap


def feature_gradients(sch: Schedule, config: AttentionConfig, feature_map: FeatureMap) -> None:
    """Schedule `te.feature_gradients`: parallel over 64 positions, a few rows of all channels in registers."""
    lanes, vectors = config.lanes, -(-config.head_dim // config.lanes)
    b, h, i, channel = sch.get_loops(sch.get_sblock("grad_x"))
    tile, row, row_inner = sch.split(i, [None, BLOCK // (rows := largest_divisor(BLOCK, max(1, 16 // vectors))), rows])
    task = sch.fuse(b, h, tile)
    sch.parallel(task)
    sch.vectorize(sch.split(channel, [None, lanes])[1])
    for name in ("inward", "scale"):
        at_consumer(sch, sch.get_sblock(name), row)
    for name in ("total",) if feature_map == "prf" else ("dot", "norm"):
        at_consumer(sch, sch.get_sblock(name), row)
    for name in () if feature_map == "prf" else ("dot_lanes", "norm_lanes"):
        in_lanes = sch.get_sblock(name)
        at_consumer(sch, in_lanes, row)
        i, lane, part = sch.get_loops(in_lanes)[-3:]
        sch.reorder(part, i, lane)
        vectorize(sch, in_lanes, unrolled=1)
        vectorize(sch, sch.decompose_reduction(in_lanes, part), unrolled=1)
    along = sch.get_sblock("along")
    at_consumer(sch, along, row)
    i, channel, feature = sch.get_loops(along)[-3:]
    vector, lane = sch.split(channel, [None, lanes])
    sch.reorder(feature, i, vector, lane)
    vectorize(sch, along, unrolled=2)
    vectorize(sch, sch.decompose_reduction(along, feature), unrolled=2)
    argument = sch.get_sblock("argument")
    at_consumer(sch, argument, row)
    sch.split(sch.get_loops(argument)[-1], [None, lanes])
    vectorize(sch, argument, unrolled=2)
    exponents = sch.get_sblock("exponents")
    at_consumer(sch, exponents, task)
    sch.split(sch.get_loops(exponents)[-1], [None, lanes])
    vectorize(sch, exponents, unrolled=1)
