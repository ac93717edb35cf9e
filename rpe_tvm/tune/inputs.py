"""The file with the arguments of a config's tuned function and what is known of its result."""

from __future__ import annotations

from pathlib import Path

from rpe_tvm.plan.backward import BackwardConfig
from rpe_tvm.plan.config import AttentionConfig
from rpe_tvm.tune.attention_case import attention_case
from rpe_tvm.tune.backward_case import backward_case


def save(config: AttentionConfig, heads: int, path: Path) -> None:
    """Write a full bucket, batch 1, as `Case.save` does."""
    case = backward_case(config, heads) if isinstance(config, BackwardConfig) else attention_case(config, heads)
    case.save(path)
