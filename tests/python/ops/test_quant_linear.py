"""A linear layer that keeps codes: PyTorch's own results and gradients, compiled, what is kept, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def operands(device="cpu", dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(3, 4, 32, device=device).to(dtype)
    return x, torch.randn(6, 32, device=device).to(dtype), torch.randn(6, device=device).to(dtype)


@DEVICES
@DTYPES
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_linear_of_what_is_fake_quantized(device, dtype, per_token, symmetric):
    tensors = operands(device, dtype)
    ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    low, high = (-128, 127) if symmetric else (0, 255)
    limits = {"quant_min": low, "quant_max": high}
    if per_token:
        values, codes, scale, point = quantrain.norm_act_fake_quantize_dynamic(ours[0], symmetric=symmetric, **limits)
        plain = ops.fake_quantize_dynamic(theirs[0], [3, 4, 1], symmetric=symmetric, **limits)
    else:
        scale = torch.tensor([0.02], device=device)
        point = torch.tensor([120], dtype=torch.int32, device=device)
        zero = None if symmetric else point
        values, codes = quantrain.norm_act_fake_quantize(ours[0], None, None, None, scale, zero, **limits)
        plain = quantrain.fake_quantize(theirs[0], scale, zero, **limits)
    y = quantrain.quant_linear(values, codes, scale, None if symmetric else point, *ours[1:])
    want = F.linear(plain, *theirs[1:])
    assert torch.equal(y, want)
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        if device == "cpu":
            assert torch.equal(a.grad, b.grad)
        else:  # cuBLAS may take another kernel
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-2)


def test_a_byte_is_kept_per_element():
    x, weight, bias = operands()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        values, codes, scale, _ = quantrain.norm_act_fake_quantize_dynamic(x.requires_grad_())
        quantrain.quant_linear(values, codes, scale, None, weight.requires_grad_(), bias)
    sizes = sorted(t.numel() * t.element_size() for t in kept if t is not None and t.numel() > 0)
    assert sizes == sorted([x.numel(), scale.numel() * 4, weight.numel() * 4])


@DEVICES
def test_opcheck_compilers_and_second_derivatives(device):
    x, weight, bias = (t.requires_grad_() for t in operands(device))

    def run(x, weight, bias):
        values, codes, scale, _ = ops.norm_act_fake_quantize_dynamic(x)
        return ops.quant_linear(values, codes, scale, None, weight, bias)

    values, codes, scale, _ = (t.detach() for t in quantrain.norm_act_fake_quantize_dynamic(x))
    opcheck(ops.quant_linear, (values.requires_grad_(), codes, scale, None, weight, bias))
    want = run(x, weight, bias)
    for dynamic in (False, True):
        found = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x, weight, bias)
        torch.testing.assert_close(found, want)
        a = torch.autograd.grad(found.sum(), (x, weight, bias))
        torch.testing.assert_close(a, torch.autograd.grad(want.sum(), (x, weight, bias), retain_graph=True))
    (grad,) = torch.autograd.grad(want.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="quant_linear: expected one derivative"):
        grad.sum().backward()


def test_autocast_casts_as_linear():
    x, weight, bias = operands()
    values, codes, scale, _ = quantrain.norm_act_fake_quantize_dynamic(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantrain.quant_linear(values, codes, scale, None, weight, bias)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(values, weight, bias))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"codes": torch.zeros(3, 4, 31, dtype=torch.int8)}, ValueError, "expected codes of input's shape"),
        ({"codes": torch.zeros(3, 4, 32)}, TypeError, "expected codes of int8 or uint8"),
        ({"scale": torch.ones(5)}, ValueError, "expected scale to have one element or"),
        ({"scale": torch.ones(1).double()}, TypeError, "expected scale of float32"),
        ({"zero_point": torch.ones(1)}, TypeError, "expected zero_point of an integer type"),
        ({"weight": torch.zeros(6, 31)}, ValueError, r"expected weight \[N, K\] of input's last dimension"),
        ({"weight": torch.zeros(6, 32).half()}, TypeError, "expected weight of input's type"),
        ({"bias": torch.zeros(5)}, ValueError, "expected bias of weight's dimension 0"),
    ],
)
def test_what_it_refuses(change, error, text):
    x, weight, bias = operands()
    arguments = {"input": x, "codes": torch.zeros(x.shape, dtype=torch.int8), "scale": torch.ones(1)}
    with pytest.raises(error, match=f"quant_linear: {text}"):
        quantrain.quant_linear(**(arguments | {"zero_point": None, "weight": weight, "bias": bias} | change))
