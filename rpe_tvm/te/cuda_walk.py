"""How a block walks over tiles: one is used while the copies of the next are on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm.script import tirx as T

from rpe_tvm.te import cuda_warp as warp
from rpe_tvm.te.cuda_function import let, named
from rpe_tvm.te.cuda_warp import Expr


class Stages(Protocol):
    """What a config says of the tiles in shared memory: how many there are, and the bytes of one."""

    @property
    def stages(self) -> int: ...

    @property
    def stage_bytes(self) -> int: ...


def walk(
    config: Stages, base: Expr, tiles: Expr, load: Callable[[Expr, Expr], None], add: Callable[[Expr, Expr], None]
) -> None:
    """Call `load(address of a stage, tile)` for all tiles and, when its copies have arrived, `add(offset, tile)`."""
    for stage in range(config.stages - 1):
        with T.If(stage < tiles), T.Then():
            load(base + T.uint32(stage * config.stage_bytes), T.int32(stage))
        warp.commit()
    # where the stage in use lies: a register, or nvcc keeps the next value of every address made of it in another
    used = named("used", warp.registers(1, "uint32"))
    T.buffer_store(used, T.uint32(0), [0])
    last = T.uint32((config.stages - 1) * config.stage_bytes)
    size = T.uint32(config.stage_bytes)
    with T.serial(tiles) as tile:
        warp.wait(config.stages - 2)
        warp.barrier()
        ahead = tile + (config.stages - 1)
        with T.If(ahead < tiles), T.Then():
            load(let("free", base + T.Select(used[0] == 0, last, used[0] - size)), ahead)
        warp.commit()
        add(used[0], tile)
        T.buffer_store(used, T.Select(used[0] == last, T.uint32(0), used[0] + size), [0])
