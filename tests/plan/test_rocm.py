"""The rule for configs on AMD GPUs."""

import pytest

from rpe_tvm.plan import gpu, gpu_choice, rocm
from rpe_tvm.plan.rocm_limits import MAX_THREADS, SHARED_BYTES, WAVES


@pytest.mark.parametrize("arch", WAVES)
@pytest.mark.parametrize("n", [1, 64, 100, 256, 512, 1000, 2048, 2049, 4096, 8192, 16384, 32768])
def test_configs_keep_the_limits(arch, n):
    config = gpu_choice.choose(n, 32, 64, target_id=f"rocm-{arch}")
    assert config == gpu_choice.rule(n, 32, 64, target_id=f"rocm-{arch}") == rocm.choose(n, 32, 64, f"rocm-{arch}")
    assert n <= config.length < max(2 * n, 65) and config.length == gpu.gpu_bucket(n)
    assert 32 <= config.threads <= MAX_THREADS and config.blocks_per_sm == 0
    # value of all positions, and one of the two stages that it is transformed through
    assert 8 * (config.length // config.columns + config.row) <= SHARED_BYTES
    assert config.threads >= WAVES[arch] or config.length < 512


def test_longer_sequences_are_refused():
    assert rocm.choose(65536, 32, 64, "rocm-gfx942").columns == 32
    with pytest.raises(ValueError, match="at most 65536 positions on rocm-gfx942, got 65537"):
        gpu_choice.choose(65537, 32, 64, target_id="rocm-gfx942")
    with pytest.raises(ValueError, match="at most 32768 positions on rocm-gfx1100, got 32769"):
        gpu_choice.choose(32769, 32, 64, target_id="rocm-gfx1100")


def test_sixteen_bits_are_converted():
    with pytest.raises(ValueError, match="No kernel for bfloat16 on rocm-gfx942: .* float32"):
        gpu_choice.choose(1000, 32, 64, "bfloat16", "rocm-gfx942")
