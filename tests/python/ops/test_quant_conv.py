"""A convolution that keeps codes: PyTorch's own results and gradients, compiled, what is kept, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def operands(device="cpu", dtype=torch.float32, layout=torch.contiguous_format, affine=True):
    torch.manual_seed(1)
    x = torch.randn(3, 4, 9, 7, device=device).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(6, 2, 3, 3, device=device).to(dtype)
    scale = torch.tensor([0.02], device=device)
    zero = torch.tensor([120], dtype=torch.int32, device=device) if affine else None
    return x, weight, torch.randn(6, device=device).to(dtype), scale, zero


@DEVICES
@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False])
def test_it_is_conv2d_of_what_is_fake_quantized(device, dtype, layout, affine):
    x, weight, bias, scale, zero = operands(device, dtype, layout, affine)
    limits = {"quant_min": 0, "quant_max": 255} if affine else {}
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    values, codes = quantrain.fake_quantize_codes(ours[0], scale, zero, **limits)
    plain = quantrain.fake_quantize(theirs[0], scale, zero, **limits)
    assert torch.equal(values, plain) and values.stride() == plain.stride()
    code_type = torch.uint8 if affine else torch.int8
    assert torch.equal(codes, quantrain.quantize(x, scale, zero, dtype=code_type, **limits))
    window = (2, 1, 1, 2)
    y = quantrain.quant_conv2d(values, codes, scale, zero, *ours[1:], *window)
    want = F.conv2d(plain, *theirs[1:], *window)
    assert torch.equal(y, want)
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        if device == "cpu":
            assert torch.equal(a.grad, b.grad)
        else:  # cuDNN may take another kernel
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-2)


def test_a_byte_is_kept_per_element():
    x, weight, bias, scale, zero = operands()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        values, codes = quantrain.fake_quantize_codes(x.requires_grad_(), scale, zero, quant_min=0, quant_max=255)
        quantrain.quant_conv2d(values, codes, scale, zero, weight.requires_grad_(), bias, 1, 0, 1, 2)
    sizes = sorted(t.numel() * t.element_size() for t in kept if t is not None)
    assert sizes == sorted([(x.numel() + 7) // 8, x.numel(), 4, 4, weight.numel() * 4])


@DEVICES
def test_opcheck_compilers_and_second_derivatives(device):
    x, weight, bias, scale, zero = operands(device)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))

    def run(x, weight, bias):
        values, codes = ops.fake_quantize_codes(x, scale, zero, quant_min=0, quant_max=255)
        return ops.quant_conv2d(values, codes, scale, zero, weight, bias, [1, 1], [1, 1], [1, 1], 2)

    opcheck(ops.fake_quantize_codes, (x, scale, zero), {"quant_min": 0, "quant_max": 255})
    values, codes = (t.detach() for t in quantrain.fake_quantize_codes(x, scale, zero, quant_min=0, quant_max=255))
    opcheck(ops.quant_conv2d, (values.requires_grad_(), codes, scale, zero, weight, bias, [1, 1], [1, 1], [1, 1], 2))
    want = run(x, weight, bias)
    for dynamic in (False, True):
        found = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x, weight, bias)
        torch.testing.assert_close(found, want)
        a = torch.autograd.grad(found.sum(), (x, weight, bias))
        b = torch.autograd.grad(want.sum(), (x, weight, bias), retain_graph=True)
        torch.testing.assert_close(a, b)
    (grad,) = torch.autograd.grad(want.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="quant_conv2d: expected one derivative"):
        grad.sum().backward()


def test_autocast_casts_as_conv2d():
    x, weight, bias, scale, zero = operands()
    values, codes = quantrain.fake_quantize_codes(x, scale, zero, quant_min=0, quant_max=255)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantrain.quant_conv2d(values, codes, scale, zero, weight, bias, groups=2)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.conv2d(values, weight, bias, groups=2))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"codes": torch.zeros(3, 4, 9, 6, dtype=torch.int8)}, ValueError, "expected codes of input's shape"),
        ({"codes": torch.zeros(3, 4, 9, 7)}, TypeError, "expected codes of int8 or uint8"),
        ({"scale": torch.ones(4)}, ValueError, "expected one scale"),
        ({"scale": torch.ones(1).double()}, TypeError, "expected scale of float32"),
        ({"zero_point": torch.ones(1)}, TypeError, "expected zero_point of an integer type"),
        ({"input": torch.zeros(4, 9, 7)}, ValueError, r"expected input \[N, C, H, W\]"),
    ],
)
def test_what_it_refuses(change, error, text):
    x, weight, bias, scale, zero = operands()
    arguments = {"input": x, "codes": torch.zeros(x.shape, dtype=torch.int8), "scale": scale, "zero_point": zero}
    with pytest.raises(error, match=f"quant_conv2d: {text}"):
        quantrain.quant_conv2d(**(arguments | {"weight": weight, "groups": 2} | change))
