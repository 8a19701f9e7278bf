"""What the operators refuse: each message names the operator, the rule and the value, in eager, on Meta and so under a compiler."""

import re

import pytest
import torch
from samples.gradient_quant import QUANTIZERS, on_each_device, simulate

import quantrain

ops = torch.ops.quantrain
X = torch.randn(4, 6)


def both(*arguments, **keywords):
    """Calls of the simulated and the integer form that must fail alike."""
    return [
        ("quantize_gradient", lambda x: quantrain.quantize_gradient(x, *arguments, **keywords)),
        ("quantize_gradient_codes", lambda x: quantrain.quantize_gradient_codes(x, *arguments, **keywords)),
        ("quantize_gradient", lambda x: ops.quantize_gradient.seeded(x, *arguments, **keywords, seed=1, offset=0)),
        ("quantize_gradient_codes", lambda x: ops.quantize_gradient_codes.seeded(x, *arguments, **keywords, seed=1, offset=0)),
    ]  # fmt: skip


REQUESTS = [
    ("expected bits in 2 to 8, got 1", both(1, "per_tensor")),
    ("expected bits in 2 to 8, got 9", both(9, "householder")),
    ("expected bits in 2 to 8, got -3", both(-3, "per_sample")),
    ("expected quantizer to be one of per_tensor, per_sample, per_channel, householder, got 'per_row'", both(8, "per_row")),
    ("expected quantizer to be one of per_tensor, per_sample, per_channel, householder, got ''", both(8, "")),
    ("expected rows to be one of sample, token, got 'batch'", both(8, "per_sample", rows="batch")),
    ("expected max_group in 3 to 256, got 2", both(8, "householder", max_group=2)),
    ("expected max_group in 3 to 256, got 257", both(8, "householder", max_group=257)),
    ("expected max_group in 3 to 256, got 0", both(8, "householder", max_group=0)),
    ("expected max_group in 3 to 256, got -1", both(8, "householder", max_group=-1)),
    ("expected preserve_zero with another quantizer than householder, got it with householder", both(8, "householder", preserve_zero=True)),
]  # fmt: skip
GRADS = [
    (ValueError, "expected at least one sample, got grad of shape [0, 6]", lambda x: x[:0], "sample"),
    (ValueError, "expected at least one token, got grad of shape [0, 6]", lambda x: x[:0], "token"),
    (ValueError, "expected at least one token, got grad of shape [3, 0, 5]", lambda x: x.new_empty(3, 0, 5), "token"),
    (ValueError, "expected grad with at least one dimension, got 0", lambda x: x[0, 0], "sample"),
    (TypeError, "expected grad of float32, float16 or bfloat16, got Int", lambda x: x.int(), "sample"),
    (TypeError, "expected grad of float32, float16 or bfloat16, got Char", lambda x: x.to(torch.int8), "sample"),
    (TypeError, "expected grad of float32, float16 or bfloat16, got Bool", lambda x: x.bool(), "sample"),
    (TypeError, "expected grad of float32, float16 or bfloat16, got Double", lambda x: x.double(), "sample"),
    (TypeError, "expected grad of float32, float16 or bfloat16, got ComplexFloat", lambda x: x.to(torch.complex64), "sample"),
]  # fmt: skip

on_each_device_and_meta = pytest.mark.parametrize(
    "device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)]
)


@on_each_device_and_meta
@pytest.mark.parametrize(("message", "calls"), REQUESTS, ids=[m[:60] for m, _ in REQUESTS])
def test_requests_are_refused_everywhere(message, calls, device):
    for op, call in calls:
        with pytest.raises(ValueError, match=re.escape(f"{op}: {message}")):
            call(X.to(device))


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "make", "rows"), GRADS, ids=[m[:70] for _, m, _, _ in GRADS])
def test_gradients_are_refused_everywhere(error, message, make, rows, device):
    grad = make(X.to(device))
    for quantizer in ("per_tensor", "per_sample", "per_channel", "householder"):
        for op, call in both(8, quantizer, rows=rows):
            with pytest.raises(error, match=re.escape(f"{op}: {message}")):
                call(grad)


def test_sparse_gradients_are_refused():
    for op, call in both(8, "per_sample"):
        with pytest.raises((TypeError, NotImplementedError), match=f"{op}"):
            call(X.to_sparse())


def parts(device="cpu", quantizer="householder"):
    return list(quantrain.quantize_gradient_codes(torch.randn(5, 6, device=device), 8, quantizer))


def replaced(at, change):
    def make(device):
        values = parts(device)
        values[at] = change(values[at])
        return values

    return make


CODES, SCALE, OFFSET, ORDER, REFLECTOR = range(5)
DEQUANTIZE = [
    (TypeError, "expected codes of int8, got Int", replaced(CODES, lambda t: t.int())),
    (TypeError, "expected codes of int8, got Float", replaced(CODES, lambda t: t.float())),
    (ValueError, "expected codes [N, D], got shape [30]", replaced(CODES, lambda t: t.flatten())),
    (TypeError, "expected scale and offset of float32", replaced(SCALE, lambda t: t.half())),
    (TypeError, "expected scale and offset of float32", replaced(OFFSET, lambda t: t.double())),
    (ValueError, "expected scale and offset [1, 1], [N, 1] or [1, D] for codes [5, 6], got [4, 1]", replaced(SCALE, lambda t: t[:4])),
    (ValueError, "expected scale and offset [1, 1], [N, 1] or [1, D] for codes [5, 6], got [5]", replaced(OFFSET, lambda t: t.flatten())),
    (TypeError, "expected order of int32, got Long", replaced(ORDER, lambda t: t.long())),
    (ValueError, "expected order of shape [5] or [0], got [3]", replaced(ORDER, lambda t: t[:3])),
    (TypeError, "expected reflector of float32, got Half", replaced(REFLECTOR, lambda t: t.half())),
    (ValueError, "expected reflector of shape [5, 4], got [5, 3]", replaced(REFLECTOR, lambda t: t[:, :3])),
    (ValueError, "expected reflector of shape [5, 4], got [0, 4]", replaced(REFLECTOR, lambda t: t[:0])),
]  # fmt: skip


@on_each_device_and_meta
@pytest.mark.parametrize(("error", "message", "make"), DEQUANTIZE, ids=[m[:70] for _, m, _ in DEQUANTIZE])
def test_dequantize_refuses(error, message, make, device):
    with pytest.raises(error, match=re.escape(f"dequantize_gradient: {message}")):
        ops.dequantize_gradient(*make(device))


@on_each_device_and_meta
def test_dequantize_refuses_a_type_without_meaning(device):
    with pytest.raises(TypeError, match="dequantize_gradient: expected dtype float32, float16 or bfloat16, got Double"):
        quantrain.QuantizedGradient(*parts(device)).dequantize(torch.float64)


@on_each_device_and_meta
def test_reflect_rows_refuses(device):
    _, _, _, order, reflector = parts(device)
    x = torch.randn(5, 3, device=device)
    for error, message, arguments in (
        (TypeError, "expected input of float32, got Half", (x.half(), order, reflector)),
        (ValueError, "expected input [N, K], got shape [15]", (x.flatten(), order, reflector)),
        (ValueError, "expected order of shape [4] or [0], got [5]", (x[:4], order, reflector)),
        (TypeError, "expected order of int32, got Long", (x, order.long(), reflector)),
        (ValueError, "expected reflector of shape [5, 4], got [4, 4]", (x, order, reflector[:4])),
    ):
        with pytest.raises(error, match=re.escape(f"_reflect_rows: {message}")):
            ops._reflect_rows(*arguments)


@on_each_device
@pytest.mark.parametrize("at", [-1, 5, 2**30])
def test_an_order_that_names_no_row_is_refused_or_harmless(at, device):
    """A plan comes from quantize_gradient_codes; one from elsewhere must not touch memory that is not the tensor's."""
    if device == "cuda":
        pytest.skip("the check would wait for the device")
    _, _, _, order, reflector = parts()
    order = order.clone()
    order[2] = at
    with pytest.raises(ValueError, match=re.escape(f"_reflect_rows: expected order in [0, 5), got {at}")):
        ops._reflect_rows(torch.randn(5, 3), order, reflector)


@pytest.mark.cuda
def test_devices_that_differ_are_refused():
    values = parts("cuda")
    for at in range(1, 5):
        mixed = list(values)
        mixed[at] = mixed[at].cpu()
        with pytest.raises(TypeError, match="dequantize_gradient: expected .* on cuda:0"):
            ops.dequantize_gradient(*mixed)


@on_each_device
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_generator_of_another_device_is_refused(device, quantizer):
    other = "cpu" if device == "cuda" else "cuda"
    if other == "cuda" and not torch.cuda.is_available():
        other = "meta"
    try:
        generator = torch.Generator(other)
    except RuntimeError:
        pytest.skip("no other device to make a generator on")
    with pytest.raises(TypeError, match="quantize_gradient: expected generator on"):
        simulate(X.to(device), quantizer, generator=generator)
    with pytest.raises(TypeError, match="quantize_gradient_codes: expected generator on"):
        quantrain.quantize_gradient_codes(X.to(device), 8, quantizer.quantizer, generator=generator)
