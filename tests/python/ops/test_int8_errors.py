"""What the operators refuse: each message names the operator, the rule and the value, in eager and on Meta, so under a compiler too."""

import re

import pytest
import torch
from samples.int8 import codes, on_each_device, scales

import quantrain

ops = torch.ops.quantrain
on_each_device_and_meta = pytest.mark.parametrize(
    "device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)]
)

X, A, B = torch.randn(4, 6), codes((4, 6)), codes((5, 6), 1)
SA, SB = scales(4), scales(5, 1)

# (operators, error, message, arguments, keywords)
QUANTIZERS = {
    "int8_quantize_rows": quantrain.int8_quantize_rows,
    "int8_quantize_columns": quantrain.int8_quantize_columns,
    "int8_quantize_rows_and_columns": quantrain.int8_quantize_rows_and_columns,
}
INPUTS = [
    (TypeError, "expected input of float32, float16 or bfloat16, got Double", lambda x: x.double()),
    (TypeError, "expected input of float32, float16 or bfloat16, got Int", lambda x: x.int()),
    (TypeError, "expected input of float32, float16 or bfloat16, got Char", lambda x: x.to(torch.int8)),
    (TypeError, "expected input of float32, float16 or bfloat16, got Bool", lambda x: x.bool()),
    (TypeError, "expected input of float32, float16 or bfloat16, got ComplexFloat", lambda x: x.to(torch.complex64)),
    (ValueError, "expected input with at least one column, got []", lambda x: x[0, 0]),
    (ValueError, "expected input with at least one column, got [4, 0]", lambda x: x[:, :0]),
]


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "make"), INPUTS, ids=[m for _, m, _ in INPUTS])
def test_inputs_are_refused(error, message, make, device):
    x = make(X.to(device))
    for name, function in QUANTIZERS.items():
        for call in (function, lambda x, name=name: getattr(ops, name).seeded(x, seed=1, offset=0)):
            with pytest.raises(error, match=re.escape(f"{name}: {message}")):
                call(x)


COLUMN_FACTORS = [
    (TypeError, "expected column_factor of float32, got Half", lambda f: f.half()),
    (ValueError, "expected column_factor of 6 elements, got [5]", lambda f: f[:5]),
    (ValueError, "expected column_factor of 6 elements, got [1]", lambda f: f[:1]),
]
ROW_FACTORS = [
    (TypeError, "expected row_factor of float32, got BFloat16", lambda f: f.bfloat16()),
    (ValueError, "expected row_factor of 4 elements, got [6]", lambda f: f),
]


@on_each_device_and_meta
def test_factors_are_refused(device):
    x, factor = X.to(device), torch.ones(6, device=device)
    for error, message, make in COLUMN_FACTORS:
        for name in ("int8_quantize_rows", "int8_quantize_rows_and_columns"):
            with pytest.raises(error, match=re.escape(f"{name}: {message}")):
                QUANTIZERS[name](x, column_factor=make(factor))
    for error, message, make in ROW_FACTORS:
        for name in ("int8_quantize_columns", "int8_quantize_rows_and_columns"):
            with pytest.raises(error, match=re.escape(f"{name}: {message}")):
                QUANTIZERS[name](x, row_factor=make(factor))


@on_each_device
def test_a_factor_or_generator_elsewhere_is_refused(device):
    x, other = X.to(device), "meta"
    with pytest.raises(TypeError, match=re.escape(f"int8_quantize_rows: expected column_factor on input's device {x.device}, got meta")):  # fmt: skip
        quantrain.int8_quantize_rows(x, column_factor=torch.ones(6, device=other))
    with pytest.raises(TypeError, match=re.escape(f"int8_quantize_columns: expected row_factor on input's device {x.device}, got meta")):  # fmt: skip
        quantrain.int8_quantize_columns(x, row_factor=torch.ones(4, device=other))


@pytest.mark.cuda
def test_a_generator_of_another_device_is_refused():
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for name, function in QUANTIZERS.items():
            with pytest.raises(TypeError, match=f"{name}: expected generator on {device}"):
                function(X.to(device), stochastic=True, generator=torch.Generator(other))


@on_each_device_and_meta
def test_transposes_refuse(device):
    a, x, s = A.to(device), X.to(device), SA.to(device)
    for error, message, call in (
        (TypeError, "int8_transpose: expected codes of int8, got Float", lambda: quantrain.int8_transpose(x)),
        (TypeError, "int8_transpose: expected codes of int8, got Byte", lambda: quantrain.int8_transpose(a.to(torch.uint8))),
        (ValueError, "int8_transpose: expected codes [M, K], got [24]", lambda: quantrain.int8_transpose(a.flatten())),
        (ValueError, "int8_transpose: expected codes [M, K], got [2, 2, 6]", lambda: quantrain.int8_transpose(a.view(2, 2, 6))),
        (ValueError, "int8_weight_transpose: expected scheme fold, columns or auto, got 'rows'", lambda: quantrain.int8_weight_transpose(x, s, scheme="rows")),
        (TypeError, "int8_weight_transpose: expected weight of float32, float16, bfloat16 or int8, got Double", lambda: quantrain.int8_weight_transpose(x.double(), s)),
        (ValueError, "int8_weight_transpose: expected weight [O, K], got [2, 2, 6]", lambda: quantrain.int8_weight_transpose(x.view(2, 2, 6), s)),
        (ValueError, "int8_weight_transpose: expected weight with at least one column, got [4, 0]", lambda: quantrain.int8_weight_transpose(x[:, :0], s)),
        (TypeError, "int8_weight_transpose: expected scale of float32, got Half", lambda: quantrain.int8_weight_transpose(x, s.half())),
        (ValueError, "int8_weight_transpose: expected scale of 4 elements, got [3]", lambda: quantrain.int8_weight_transpose(x, s[:3])),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            call()


PRODUCTS = [
    (TypeError, "expected a and b of int8, got Float and Char", lambda a, b, s, t: (a.float(), b)),
    (TypeError, "expected a and b of int8, got Char and Byte", lambda a, b, s, t: (a, b.to(torch.uint8))),
    (ValueError, "expected a [..., K] and b [N, K], got [4, 6] and [5, 5]", lambda a, b, s, t: (a, b[:, :5])),
    (ValueError, "expected a [..., K] and b [N, K], got [4, 6] and [6]", lambda a, b, s, t: (a, b[0])),
    (ValueError, "expected a [..., K] and b [N, K], got [4, 6] and [1, 5, 6]", lambda a, b, s, t: (a, b[None])),
    (ValueError, "expected a [..., K] and b [N, K], got [] and [5, 6]", lambda a, b, s, t: (a[0, 0], b)),
    (TypeError, "expected a_scale of float32, got Half", lambda a, b, s, t: (a, b, s.half())),
    (TypeError, "expected b_scale of float32, got Double", lambda a, b, s, t: (a, b, s, t.double())),
    (ValueError, "expected a_scale of 4 elements or of one, got [5]", lambda a, b, s, t: (a, b, t)),
    (ValueError, "expected b_scale of 5 elements or of one, got [4]", lambda a, b, s, t: (a, b, s, s)),
    (ValueError, "expected b_scale of 5 elements or of one, got [0]", lambda a, b, s, t: (a, b, None, t[:0])),
]


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "make"), PRODUCTS, ids=[m for _, m, _ in PRODUCTS])
def test_products_are_refused(error, message, make, device):
    arguments = make(*(t.to(device) for t in (A, B, SA, SB)))
    with pytest.raises(error, match=re.escape(f"int8_mm: {message}")):
        quantrain.int8_mm(*arguments)
    total = torch.zeros(4, 5, device=device)
    with pytest.raises(error, match=re.escape(f"int8_mm_accumulate_: {message}")):
        quantrain.int8_mm_accumulate_(total, *arguments)
    assert device == "meta" or (total == 0).all()


@on_each_device_and_meta
def test_a_bias_type_or_accumulator_without_meaning_is_refused(device):
    a, b = A.to(device), B.to(device)
    bias, total = torch.zeros(5, device=device), torch.zeros(4, 5, device=device)
    for error, message, call in (
        (TypeError, "int8_mm: expected bias of a floating type on", lambda: quantrain.int8_mm(a, b, bias=bias.int())),
        (ValueError, "int8_mm: expected bias of b's dimension 0, got [4] and [5, 6]", lambda: quantrain.int8_mm(a, b, bias=bias[:4])),
        (ValueError, "int8_mm: expected bias of b's dimension 0, got [1, 5] and [5, 6]", lambda: quantrain.int8_mm(a, b, bias=bias[None])),
        (TypeError, "int8_mm: expected out_dtype to be one of float32, float16, bfloat16, got torch.int32", lambda: quantrain.int8_mm(a, b, out_dtype=torch.int32)),
        (TypeError, "int8_mm: expected out_dtype to be one of float32, float16, bfloat16, got torch.float64", lambda: quantrain.int8_mm(a, b, out_dtype=torch.float64)),
        (TypeError, "int8_mm_accumulate_: expected accumulator of float32, float16 or bfloat16 on", lambda: quantrain.int8_mm_accumulate_(total.double(), a, b)),
        (ValueError, "int8_mm_accumulate_: expected accumulator [M, N] for a [M, K] and b [N, K], got [5, 4], [4, 6] and [5, 6]", lambda: quantrain.int8_mm_accumulate_(total.t(), a, b)),
        (ValueError, "int8_mm_accumulate_: expected accumulator [M, N] for a [M, K] and b [N, K], got [20], [4, 6] and [5, 6]", lambda: quantrain.int8_mm_accumulate_(total.flatten(), a, b)),
        (ValueError, "int8_mm_accumulate_: expected accumulator [M, N] for a [M, K] and b [N, K], got [4, 5], [2, 2, 6] and [5, 6]", lambda: quantrain.int8_mm_accumulate_(total, a.view(2, 2, 6), b)),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            call()


@on_each_device
def test_operands_on_other_devices_are_refused(device):
    a, b, s, t = (x.to(device) for x in (A, B, SA, SB))
    for message, arguments in (
        (f"expected b on a's device {a.device}, got meta", (a, b.to("meta"))),
        (f"expected a_scale on the operands' device {a.device}, got meta", (a, b, s.to("meta"))),
        (f"expected b_scale on the operands' device {a.device}, got meta", (a, b, s, t.to("meta"))),
        (f"expected bias of a floating type on {a.device}, got Float on meta", (a, b, s, t, t.to("meta"))),
    ):
        with pytest.raises(TypeError, match=re.escape(f"int8_mm: {message}")):
            quantrain.int8_mm(*arguments)


@pytest.mark.cuda
def test_a_scale_on_the_host_is_refused():
    with pytest.raises(TypeError, match="int8_mm: expected a_scale on the operands' device cuda:0, got cpu"):
        quantrain.int8_mm(A.cuda(), B.cuda(), SA)
    with pytest.raises(TypeError, match="int8_mm: expected a_scale on the operands' device cpu, got cuda:0"):
        quantrain.int8_mm(A, B, SA.cuda())
    with pytest.raises(TypeError, match="int8_mm_accumulate_: expected accumulator of .* on cuda:0, got Float on cpu"):
        quantrain.int8_mm_accumulate_(torch.zeros(4, 5), A.cuda(), B.cuda())


@on_each_device_and_meta
def test_fused_operators_refuse(device):
    x, w = X.to(device), torch.ones(6, device=device)
    first = "of the first argument's"
    for error, message, call in (
        (TypeError, "int8_layer_norm: expected input of float32, float16 or bfloat16, got Double", lambda: quantrain.int8_layer_norm(x.double())),
        (ValueError, "int8_layer_norm: expected input with at least one column, got [4, 0]", lambda: quantrain.int8_layer_norm(x[:, :0])),
        (TypeError, "int8_layer_norm: expected weight of type Float or float32 on", lambda: quantrain.int8_layer_norm(x, w.half())),
        (ValueError, "int8_layer_norm: expected weight of input's last dimension, got [5] and [4, 6]", lambda: quantrain.int8_layer_norm(x, w[:5])),
        (ValueError, "int8_layer_norm: expected bias of input's last dimension, got [1, 6] and [4, 6]", lambda: quantrain.int8_layer_norm(x, w, w[None])),
        (TypeError, "int8_layer_norm: expected weight and bias of one type, got Half and Float", lambda: quantrain.int8_layer_norm(x.half(), w.half(), w)),
        (ValueError, "int8_layer_norm: expected eps of at least 0, got -1", lambda: quantrain.int8_layer_norm(x, w, w, -1.0)),
        (ValueError, "int8_rms_norm: expected weight of input's last dimension, got [5] and [4, 6]", lambda: quantrain.int8_rms_norm(x, w[:5])),
        (ValueError, "int8_rms_norm: expected eps of at least 0, got -1", lambda: quantrain.int8_rms_norm(x, w, -1.0)),
        (ValueError, f"int8_add_layer_norm: expected residual {first} shape, got [4, 5] and [4, 6]", lambda: quantrain.int8_add_layer_norm(x, x[:, :5])),
        (TypeError, f"int8_add_layer_norm: expected residual {first} type Float", lambda: quantrain.int8_add_layer_norm(x, x.half())),
        (ValueError, f"int8_add_rms_norm: expected residual {first} shape, got [1, 6] and [4, 6]", lambda: quantrain.int8_add_rms_norm(x, x[:1])),
        (ValueError, "int8_gelu: expected approximate none or tanh, got 'erf'", lambda: quantrain.int8_gelu(x, approximate="erf")),
        (TypeError, "int8_gelu: expected input of float32, float16 or bfloat16, got Char", lambda: quantrain.int8_gelu(x.to(torch.int8))),
        (ValueError, "int8_gelu: expected column_factor of 6 elements", lambda: quantrain.int8_gelu(x, column_factor=x[0, :5])),
        (TypeError, "int8_rms_norm: expected column_factor of float32", lambda: quantrain.int8_rms_norm(x, column_factor=x[0].half())),
        (TypeError, "int8_relu: expected input of float32, float16 or bfloat16, got Long", lambda: quantrain.int8_relu(x.long())),
        (ValueError, "int8_relu: expected input with at least one column, got [4, 0]", lambda: quantrain.int8_relu(x[:, :0])),
        (ValueError, "int8_relu: expected column_factor of 6 elements", lambda: quantrain.int8_relu(x, column_factor=x[0, :5])),
        (TypeError, "int8_relu: expected column_factor of float32", lambda: quantrain.int8_relu(x, column_factor=x[0].half())),
        (TypeError, "int8_silu_mul: expected gate of float32, float16 or bfloat16, got Int", lambda: quantrain.int8_silu_mul(x.int(), x.int())),
        (ValueError, f"int8_silu_mul: expected up {first} shape, got [6] and [4, 6]", lambda: quantrain.int8_silu_mul(x, x[0])),
        (TypeError, f"int8_silu_mul: expected up {first} type Float", lambda: quantrain.int8_silu_mul(x, x.half())),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            call()


@on_each_device
def test_a_residual_elsewhere_is_refused(device):
    x = X.to(device)
    with pytest.raises(TypeError, match=re.escape(f"on {x.device}, got Float on meta")):
        quantrain.int8_add_layer_norm(x, x.to("meta"))
    with pytest.raises(TypeError, match=re.escape(f"on {x.device}, got Float on meta")):
        quantrain.int8_rms_norm(x, torch.ones(6, device="meta"))


def test_sparse_inputs_are_refused():
    for function in QUANTIZERS.values():
        with pytest.raises((TypeError, NotImplementedError)):
            function(X.to_sparse())
