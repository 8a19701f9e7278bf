"""What the operators refuse: each message names the operator, the rule and the value, in eager, on Meta and so under a compiler."""

import re

import pytest
import torch
from samples.fake_quant import on_each_device

import quantrain

X = torch.randn(4, 6)
S = torch.tensor([0.1])
INT = torch.int32

CASES = [
    (ValueError, "fake_quantize: expected scale to divide input at dimension 1, got 4 and 6", lambda x, s: quantrain.fake_quantize(x, s.expand(4, 4))),
    (ValueError, "fake_quantize: expected scale to have one element or the input's 2 dimensions, got 1 dimensions", lambda x, s: quantrain.fake_quantize(x, s.expand(6))),
    (ValueError, "fake_quantize: expected quant_min <= quant_max, got 7 and -8", lambda x, s: quantrain.fake_quantize(x, s, quant_min=7, quant_max=-8)),
    (ValueError, "fake_quantize: expected codes of at most 16 bits", lambda x, s: quantrain.fake_quantize(x, s, quant_min=-40000)),
    (TypeError, "fake_quantize: expected input of float32, float16, bfloat16 or float64, got Int", lambda x, s: quantrain.fake_quantize(x.int(), s)),
    (TypeError, "fake_quantize: expected input of float32, float16, bfloat16 or float64, got ComplexFloat", lambda x, s: quantrain.fake_quantize(x.to(torch.complex64), s)),
    (TypeError, "fake_quantize: expected scale of float32, got BFloat16", lambda x, s: quantrain.fake_quantize(x, s.bfloat16())),
    (TypeError, "fake_quantize: expected zero_point of an integer type, got Float", lambda x, s: quantrain.fake_quantize(x, s, torch.zeros_like(s))),
    (ValueError, "fake_quantize: expected zero_point to have the shape of scale [1], got [2]", lambda x, s: quantrain.fake_quantize(x, s, torch.zeros_like(s, dtype=INT).expand(2))),
    (TypeError, "fake_quantize_learnable: expected zero_point of an integer type or float32, got Half", lambda x, s: quantrain.fake_quantize_learnable(x, s, torch.zeros_like(s).half())),
    (ValueError, "choose_qparams: expected scale_shape to divide input at dimension 0, got 3 and 4", lambda x, s: quantrain.choose_qparams(x, [3, 1])),
    (ValueError, "choose_qparams: expected quant_min < quant_max, got 3 and 3", lambda x, s: quantrain.choose_qparams(x, [1], quant_min=3, quant_max=3)),
    (ValueError, "choose_qparams: expected input with at least one element, got shape [0, 6]", lambda x, s: quantrain.choose_qparams(x[:0], [1])),
    (ValueError, "fake_quantize_dynamic: expected scale_shape to divide input at dimension 0, got 3 and 4", lambda x, s: quantrain.fake_quantize_dynamic(x, [3, 1])),
    (ValueError, "quantize: expected codes that fit Char [-128, 127], got [0, 255]", lambda x, s: quantrain.quantize(x, s, quant_min=0, quant_max=255)),
    (TypeError, "quantize: expected dtype to be one of int8, uint8, int16, int32, got torch.float32", lambda x, s: quantrain.quantize(x, s, dtype=torch.float32)),
    (TypeError, "dequantize: expected input of int8, uint8, int16 or int32, got Float", lambda x, s: quantrain.dequantize(x, s)),
    (TypeError, "dequantize: expected dtype to be one of float32, float16, bfloat16, float64, got torch.int32", lambda x, s: quantrain.dequantize(x.to(torch.int8), s, dtype=torch.int32)),
    (TypeError, "pack_int4: expected input of int8 or uint8, got Float", lambda x, s: quantrain.pack_int4(x)),
    (ValueError, "unpack_int4: expected size to be twice the 6 packed bytes, or one less, got 13", lambda x, s: quantrain.unpack_int4(x.to(torch.uint8), size=13)),
    (ValueError, "_mse_range: expected steps in [1, 65535], got 0", lambda x, s: torch.ops.quantrain._mse_range(x, [1], quant_min=-8, quant_max=7, symmetric=True, steps=0)),
    (TypeError, "_qparams_from_range: expected min and max of float32", lambda x, s: torch.ops.quantrain._qparams_from_range(s.half(), s.half(), quant_min=0, quant_max=1, symmetric=True)),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("error", "message", "call"), CASES, ids=[c[1][:60] for c in CASES])
def test_shapes_and_types_are_refused_everywhere(error, message, call, device):
    with pytest.raises(error, match=re.escape(message)):
        call(X.to(device), S.to(device))


@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan")])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_cpu_refuses_a_scale_that_is_not_positive(bad, requires_grad):
    scale = torch.tensor([[0.1], [0.1], [bad], [0.1]])
    x = X.clone().requires_grad_(requires_grad)
    message = (
        re.escape(f"expected every scale to be positive and finite, got {bad:g}".replace("got 0", "got 0"))
        + ".* at index 2"
    )
    for call in (quantrain.fake_quantize, quantrain.fake_quantize_learnable, quantrain.quantize):
        with pytest.raises(ValueError, match=f"{call.__name__}: {message}"):
            call(x, scale)


@pytest.mark.cuda
@pytest.mark.parametrize("bad", [0.0, -0.5, float("nan")])
def test_cuda_turns_a_scale_that_is_not_positive_into_nan(bad):
    scale = torch.tensor([[0.1], [0.1], [bad], [0.1]], device="cuda")
    y = quantrain.fake_quantize(X.cuda(), scale)
    assert torch.isnan(y[2]).all() and not torch.isnan(y[[0, 1, 3]]).any()


def test_cpu_refuses_a_zero_point_out_of_range():
    with pytest.raises(
        ValueError, match=re.escape("fake_quantize: expected zero_point in [0, 255], got -1 at index 0")
    ):
        quantrain.fake_quantize(X, S, torch.tensor([-1], dtype=INT), quant_min=0, quant_max=255)


def test_a_scale_that_wants_a_gradient_is_sent_to_the_learnable_operator():
    with pytest.raises(ValueError, match="fake_quantize: expected scale without requires_grad"):
        quantrain.fake_quantize(X, S.clone().requires_grad_())


def test_pack_int4_refuses_wide_codes():
    with pytest.raises(ValueError, match=re.escape("pack_int4: expected codes in [-8, 7], got [-9, 3]")):
        quantrain.pack_int4(torch.tensor([-9, 3], dtype=torch.int8))


@on_each_device
def test_a_generator_of_another_device_is_refused(device):
    other = "cpu" if device == "cuda" else "cuda"
    if other == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU to make a generator on")
    with pytest.raises(TypeError, match="quantize: expected generator on"):
        quantrain.quantize(X.to(device), S.to(device), stochastic=True, generator=torch.Generator(other))


@pytest.mark.cuda
def test_devices_that_differ_are_refused():
    with pytest.raises(TypeError, match="fake_quantize: expected scale on the input's device cuda:0, got cpu"):
        quantrain.fake_quantize(X.cuda(), S)


def test_devices_that_differ_are_refused_on_meta():
    with pytest.raises(TypeError, match="fake_quantize: expected scale on the input's device cpu, got meta"):
        torch.ops.quantrain._fake_quantize_mask(X, S.to("meta"), None, -128, 127, True)
