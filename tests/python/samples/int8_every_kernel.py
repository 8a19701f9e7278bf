"""Runs every CUDA kernel of the int8 family once on small and odd shapes, for compute-sanitizer: results are the tests' business.

compute-sanitizer --tool memcheck python tests/python/samples/int8_every_kernel.py
"""

import torch

import quantrain

ops = torch.ops.quantrain
PASSES = [(5, 7), (132, 72), (300, 4096), (260, 1000), (3, 40000), (520, 136)]
PRODUCTS = [(8, 8, 16), (136, 264, 1040), (300, 512, 4096), (33, 17, 5)]
NARROW = [
    "pingpong_128x128_2x1",
    "pingpong_64x128_2x1",
    "cooperative_128x192_2x1",
    "cooperative_128x256_1x1",
    "stream_k_128x128_2x1",
]
WIDE = ["cooperative_128x256_2x1_float32", "stream_k_128x128_2x1_float32"]


def passes(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(2))
    column_factor, row_factor = torch.rand(columns, device="cuda"), torch.rand(rows, device="cuda")
    codes, scale = ops.int8_quantize_rows(x)
    for stochastic in (False, True):
        factors = {"column_factor": column_factor, "row_factor": row_factor}
        ops.int8_quantize_rows(x, column_factor=column_factor, stochastic=stochastic)
        ops.int8_quantize_columns(x, row_factor=row_factor, stochastic=stochastic)
        ops.int8_quantize_rows_and_columns(x, **factors, stochastic=stochastic)
    ops.int8_transpose(codes)
    for scheme in ("fold", "columns", "auto"):
        for weight in (x, codes):
            ops.int8_weight_transpose(weight, scale, scheme=scheme)
    weight = torch.randn(columns, device="cuda").to(dtype)
    ops.int8_layer_norm(x, weight, weight)
    ops.int8_rms_norm(x, weight)
    for post_norm in (False, True):
        ops.int8_add_layer_norm(x, residual, weight, weight, post_norm=post_norm)
        ops.int8_add_rms_norm(x, residual, weight, post_norm=post_norm)
    for approximate in ("none", "tanh"):
        ops.int8_gelu(x, approximate=approximate)
    ops.int8_relu(x)
    ops.int8_silu_mul(x, residual)
    if columns > 1:  # halves of one tensor
        half = columns // 2
        ops.int8_silu_mul(x[:, :half], x[:, half : 2 * half])


def products(m: int, n: int, k: int) -> None:
    a, b = (torch.randint(-127, 128, (size, k), dtype=torch.int8, device="cuda") for size in (m, n))
    a_scale, b_scale, bias = (torch.rand(size, device="cuda") for size in (m, n, n))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ops.int8_mm(a, b, a_scale, b_scale, bias, out_dtype=dtype)
        ops.int8_mm_accumulate_(torch.zeros(m, n, device="cuda", dtype=dtype), a, b, a_scale, b_scale)
        kernels = ["mma_128x128"]
        if n % 8 == 0 and torch.cuda.get_device_capability()[0] == 9:
            kernels += WIDE if dtype == torch.float32 else NARROW
        for kernel in kernels:
            ops._int8_mm_by_kernel(a, b, a_scale, b_scale, bias, out_dtype=dtype, kernel=kernel)


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in PASSES:
            passes(*shape, dtype)
    for shape in PRODUCTS:
        products(*shape)
    torch.cuda.synchronize()
    print(f"quantrain {quantrain.__version__}: every kernel of int8 ran")


if __name__ == "__main__":
    main()
