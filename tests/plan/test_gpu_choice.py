"""Which algorithm serves a call on a GPU."""

import pytest

from rpe_tvm.plan import gpu, gpu_choice, gpu_direct


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensor_cores_take_sixteen_bits(dtype):
    config = gpu_choice.choose(1000, 32, 64, dtype)
    assert config == gpu_direct.choose(1000, 32, 64, dtype) and config.dtype == dtype
    assert gpu_choice.bucket(1100, dtype) == 1280
    for n, m, d in ((gpu_choice.LONGEST_DIRECT + 1, 32, 64), (1000, 32, 60), (1000, 32, 320), (1000, 1000, 64)):
        assert not gpu_choice.is_direct(n, m, d, dtype)
        with pytest.raises(ValueError, match=f"No kernel for {dtype}: expected .*got n = {n}.*Use float32"):
            gpu_choice.choose(n, m, d, dtype)


def test_the_fft_takes_float32():
    assert not gpu_choice.is_direct(1000, 32, 64, "float32")
    assert gpu_choice.choose(1000, 32, 64) == gpu.choose(1000, 32, 64)
    assert gpu_choice.bucket(1100, "float32") == 2048
    with pytest.raises(ValueError, match="positions on a GPU so far"):
        gpu_choice.choose(gpu.LONGEST + 1, 32, 64)
