"""fqt_linear and fqt_conv2d: outputs, gradients, draws and errors."""

import math
from collections import Counter
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from fake_quant_samples import assert_same, on_each_device
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import quantrain

ops = torch.ops.quantrain

QUANTIZERS = ["per_tensor", "per_sample", "per_channel", "householder"]
FALSE_ALARM = 1e-6  # of each statistical test, if its hypothesis holds


def tensors(device, *shapes, dtype=torch.float32, seed=0):
    """Leaves with gradients; the values are the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]


def gradients(y, leaves, grad_output, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return torch.autograd.grad(y, leaves, grad_output, retain_graph=True)


def quantizers(grad_input, grad_weight="per_channel", **fields):
    return {"grad_input": grad_input, "grad_weight": grad_weight, "grad_input_bits": 5, **fields}


# (input, weight, bias?, stride, padding, dilation, groups)
CONVOLUTIONS = {
    "plain": ((4, 3, 8, 8), (6, 3, 3, 3), True, 1, 0, 1, 1),
    "stride": ((4, 3, 9, 8), (6, 3, 3, 3), True, 2, 1, 1, 1),
    "sizes": ((3, 4, 9, 11), (6, 4, 3, 5), False, (2, 3), (1, 2), (1, 2), 1),
    "groups": ((4, 6, 8, 8), (4, 3, 3, 3), True, 1, 1, 1, 2),
    "depthwise": ((4, 6, 8, 8), (6, 1, 3, 3), False, 2, 1, 1, 6),
    "dilation": ((4, 3, 11, 11), (6, 3, 3, 3), True, 1, 2, 2, 1),
    "same": ((4, 3, 8, 8), (6, 3, 3, 3), True, 1, "same", 1, 1),
    "same, uneven": ((4, 3, 8, 9), (6, 3, 4, 2), True, 1, "same", (1, 3), 1),
    "valid": ((4, 3, 8, 8), (6, 3, 3, 3), False, 2, "valid", 1, 1),
    "one image": ((3, 8, 8), (6, 3, 3, 3), True, 1, 1, 1, 1),
    "1x1": ((4, 8, 5, 5), (6, 8, 1, 1), True, 1, 0, 1, 1),
}
each_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def convolution(case, device="cpu", dtype=torch.float32):
    x_shape, w_shape, has_bias, *geometry = case
    x, w, *b = tensors(device, x_shape, w_shape, *([w_shape[:1]] if has_bias else []), dtype=dtype)
    return x, w, b[0] if b else None, geometry


# ---- outputs ----------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 3, 4, 6), (6,), (0, 6)])
def test_the_output_is_that_of_linear(shape, device):
    x, w, b = tensors(device, shape, (5, 6), (5,))
    assert_same(quantrain.fqt_linear(x, w, b, **quantizers("householder")), F.linear(x, w, b))
    with torch.inference_mode():
        assert_same(quantrain.fqt_linear(x, w, **quantizers("householder")), F.linear(x, w))


@on_each_device
@each_convolution
def test_the_output_is_that_of_conv2d(case, device):
    x, w, b, geometry = convolution(case, device)
    assert_same(quantrain.fqt_conv2d(x, w, b, *geometry, **quantizers("per_sample")), F.conv2d(x, w, b, *geometry))
    with torch.inference_mode():
        assert_same(quantrain.fqt_conv2d(x, w, b, *geometry), F.conv2d(x, w, b, *geometry))


# ---- gradients --------------------------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (6,), (0, 6)])
def test_without_quantizers_the_gradients_are_those_of_linear(shape, device):
    leaves = tensors(device, shape, (5, 6), (5,), dtype=torch.float64)
    expected = F.linear(*leaves)
    g = torch.randn_like(expected)
    for mine, other in zip(
        gradients(quantrain.fqt_linear(*leaves), leaves, g), gradients(expected, leaves, g), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@on_each_device
@each_convolution
def test_without_quantizers_the_gradients_are_those_of_conv2d(case, device):
    x, w, b, geometry = convolution(case, device, torch.float64)
    leaves = [x, w] if b is None else [x, w, b]
    expected = F.conv2d(x, w, b, *geometry)
    g = torch.randn_like(expected)
    mine = gradients(quantrain.fqt_conv2d(x, w, b, *geometry), leaves, g)
    for one, other in zip(mine, gradients(expected, leaves, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@on_each_device
@pytest.mark.parametrize("rows", ["token", "sample"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("shape", [(9, 6), (4, 5, 6)])
def test_linear_takes_two_draws_of_the_default_generator(shape, quantizer, rows, device):
    x, w, b = tensors(device, shape, (5, 6), (5,))
    keywords = quantizers(quantizer, "per_channel", grad_input_rows=rows, grad_weight_rows=rows, grad_weight_bits=7)
    y = quantrain.fqt_linear(x, w, b, **keywords)
    g = torch.randn_like(y)
    grad_x, grad_w, grad_b = gradients(y, (x, w, b), g, seed=3)
    torch.manual_seed(3)
    first = quantrain.quantize_gradient(g, 5, quantizer, rows=rows)
    second = quantrain.quantize_gradient(g, 7, "per_channel", rows=rows)
    torch.testing.assert_close(grad_x, first @ w)
    torch.testing.assert_close(grad_w, second.flatten(0, -2).t() @ x.flatten(0, -2))
    torch.testing.assert_close(grad_b, g.flatten(0, -2).sum(0))
    assert not torch.equal(first, g) and not torch.equal(second, g)


@on_each_device
@each_convolution
def test_conv2d_takes_two_draws_of_the_default_generator(case, device):
    x, w, b, geometry = convolution(case, device)
    y = quantrain.fqt_conv2d(x, w, b, *geometry, **quantizers("householder", "per_tensor"))
    g = torch.randn_like(y)
    batch = g if g.dim() == 4 else g.unsqueeze(0)
    mine = gradients(y, (x, w), g, seed=3)
    torch.manual_seed(3)
    first = quantrain.quantize_gradient(batch, 5, "householder").reshape(g.shape)
    second = quantrain.quantize_gradient(batch, 8, "per_tensor").reshape(g.shape)
    expected = F.conv2d(x, w, b, *geometry)
    torch.testing.assert_close(mine[0], gradients(expected, x, first)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], gradients(expected, w, second)[0], rtol=1e-4, atol=1e-5)
