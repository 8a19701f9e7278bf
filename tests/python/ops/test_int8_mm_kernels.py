"""Every CUDA kernel of int8_mm by name: the same bits as the CPU, whatever the tile. float16 shares the kernels of bfloat16."""

import pytest
import torch
from samples.int8 import assert_same, codes, scales

import quantrain

ops = torch.ops.quantrain
pytestmark = pytest.mark.cuda

NARROW = [
    "pingpong_128x128_2x1",
    "pingpong_64x128_2x1",
    "cooperative_128x192_2x1",
    "cooperative_128x256_1x1",
    "stream_k_128x128_2x1",
]
WIDE = ["cooperative_128x256_2x1_float32", "stream_k_128x128_2x1_float32"]
KERNELS = [
    *((name, dtype) for name in NARROW for dtype in (torch.bfloat16, torch.float16)),
    *((name, torch.float32) for name in WIDE),
    *(("mma_128x128", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
]
SHAPES = [(8, 8, 16), (136, 264, 1040), (1000, 784, 720), (300, 512, 4096), (768, 768, 8192)]


def hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("setting", [(1, 0), (2, 0), (8, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("kernel, dtype", KERNELS, ids=str)
def test_each_kernel_is_exact(kernel, dtype, setting):
    if kernel != "mma_128x128" and not hopper():
        pytest.skip("not a Hopper GPU")
    swizzle, splits = setting
    if splits and not kernel.startswith("stream_k"):
        pytest.skip("only stream-K splits sums")
    for m, n, k in SHAPES:
        a, b, bias = codes((m, k), m), codes((n, k), n), torch.randn(n, generator=torch.Generator().manual_seed(k))
        for a_scale, b_scale, shift in (
            (scales(m) * 1e-4, scales(n, 1), bias),
            (scales(1) * 1e-4, None, None),
            (scales(m) * 1e-4, scales(1), None),
        ):
            expected = quantrain.int8_mm(a, b, a_scale, b_scale, shift, out_dtype=dtype)
            on_cuda = [t if t is None else t.cuda() for t in (a, b, a_scale, b_scale, shift)]
            found = ops._int8_mm_by_kernel(*on_cuda, out_dtype=dtype, kernel=kernel, swizzle=swizzle, splits=splits)
            assert_same(found.cpu(), expected)


def test_nan_scales_reach_the_result():
    a, b = codes((256, 128), 0).cuda(), codes((128, 128), 1).cuda()
    scale = torch.ones(256, device="cuda")
    scale[7] = torch.nan
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = quantrain.int8_mm(a, b, scale * 1e-4, None, out_dtype=dtype)
        assert found[7].isnan().all()
        assert found.isnan().sum() == 128


def test_an_unknown_kernel_raises():
    a = codes((8, 16), 0).cuda()
    with pytest.raises(RuntimeError, match="invalid argument"):
        ops._int8_mm_by_kernel(a, a, None, None, None, out_dtype=torch.float32, kernel="none")
