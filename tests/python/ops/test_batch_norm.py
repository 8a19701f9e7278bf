"""Batch norm in training: against float64 and PyTorch's own, with gradients, in every layout, compiled, refusals."""

import copy

import pytest
import torch
from reference import batch_norm as reference
from torch import nn
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
SHAPES = [(4, 8, 6, 4), (3, 5, 7, 7), (2, 16, 1, 1), (9, 7), (5, 24, 3), (2, 3, 2, 3, 4), (70, 40, 5, 8)]
STEP = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def laid_out(x, layout):
    if layout == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x


def operands(shape, dtype=torch.float32, device="cpu", layout="contiguous", seed=0, residual=False):
    """y with channels of other means and sizes, parameters, a residual, a gradient."""
    g = torch.Generator().manual_seed(seed)
    c = shape[1]
    view = [1, c] + [1] * (len(shape) - 2)
    y = torch.randn(shape, generator=g) * (torch.rand(c, generator=g) + 0.3).view(view)
    y = y + torch.randn(c, generator=g).view(view)
    weight, bias = torch.randn(c, generator=g), torch.randn(c, generator=g)
    scale = (torch.rand(c, generator=g) + 0.2) * torch.where(torch.rand(c, generator=g) < 0.3, -1.0, 1.0)
    more = torch.randn(shape, generator=g).to(dtype) if residual else None
    grad = torch.randn(shape, generator=g).to(dtype)
    y = laid_out(y.to(dtype).to(device), layout)
    moved = [t if t is None else laid_out(t.to(device), layout) for t in (more, grad)]
    return y, weight.to(device), bias.to(device), scale.to(device), *moved


def leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def doubles(*tensors):
    return [None if t is None else t.detach().cpu().double().requires_grad_() for t in tensors]


def close(found, want, room, text):
    off = (found.detach().cpu().double() - want.detach()).abs()
    assert (off <= room).all(), f"{text}: off by {float((off / room).max()):.3g} of what is allowed"


@DEVICES
@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "hardswish"])
def test_result_and_gradients_are_those_of_float64(device, dtype, layout, shape, activation):
    y, weight, bias, scale, residual, grad = operands(
        shape, dtype, device, layout, len(shape), residual=activation != "hardswish"
    )
    inputs = leaves(y, weight, bias, scale, residual)
    mean, variance, low, high = quantrain.batch_norm_statistics(y)
    z = quantrain.batch_norm_act(inputs[0], mean, variance, *inputs[1:], activation=activation, eps=0.01)
    z.backward(grad)
    exact = doubles(y, weight, bias, scale, residual)
    want = reference.batch_norm(*exact, activation, 0.01)
    want.backward(grad.cpu().double())

    over = [d for d in range(len(shape)) if d != 1]
    assert torch.equal(low, y.float().amin(over)) and torch.equal(high, y.float().amax(over))
    wide = y.cpu().double()
    close(mean, wide.mean(over), 1e-5 * (1 + wide.abs().amax(over)), "mean")
    close(variance, wide.var(over, unbiased=False), 1e-5 * wide.pow(2).amax(over), "variance")
    step = STEP[dtype]
    # Beside the result's own rounding, that of y - m in float32, and of m, times the norm's factor.
    view = [1, -1] + [1] * (len(shape) - 2)
    factor = exact[1] / (exact[3].abs() * (wide.var(over, unbiased=False) / exact[3] ** 2 + 0.01).sqrt())
    inner = 3e-7 * (wide.abs() + wide.mean(over).abs().view(view)) * factor.detach().abs().view(view)
    close(z, want, step * (1 + want.abs()) + inner, "result")
    assert z.dtype == dtype and z.stride() == torch.empty_like(y, memory_format=z_format(y)).stride()
    # Where float32 and float64 disagree on the side of a bend, a gradient is there or is not.
    count = y.numel() / y.shape[1]
    gradients = [t.grad for t in inputs if t is not None]
    for name, found, expected in zip(
        ("input", "weight", "bias", "conv_scale", "residual"),
        gradients,
        [t.grad for t in exact if t is not None],
        strict=False,
    ):
        size = expected.abs().amax() + (
            grad.abs().double().sum().item() / y.shape[1] * 1e-5 if expected.dim() == 1 else 0
        )
        share = ((found.cpu().double() - expected).abs() > step * 4 * (size + 0.1)).double().mean()
        assert share <= (0.0 if activation == "identity" or dtype == torch.float32 else 0.02), (
            name,
            float(share),
            count,
        )


def z_format(y):
    return (
        torch.channels_last
        if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
        else (
            torch.channels_last_3d
            if y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d) and not y.is_contiguous()
            else torch.contiguous_format
        )
    )


@DEVICES
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_it_is_pytorch_s_batch_norm(device, activation):
    """With running statistics, momentum and a factor of the convolution; bit for bit it is not, by the division."""
    torch.manual_seed(3)
    bn = nn.BatchNorm2d(12, momentum=0.3).to(device)
    with torch.no_grad():
        bn.weight.normal_()
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    ours = copy.deepcopy(bn)
    scale = torch.rand(12, device=device) + 0.5
    for layout in (torch.contiguous_format, torch.channels_last):
        y = (torch.randn(6, 12, 9, 8, device=device) * 3 + 1).contiguous(memory_format=layout)
        a, b = y.clone().requires_grad_(), y.clone().requires_grad_()
        want = reference.ACTIVATIONS[activation](bn(a / scale.view(1, -1, 1, 1)))
        statistics = ops._batch_norm_statistics(b.detach())
        ops._batch_norm_update_(
            statistics, None, None, scale, ours.running_mean, ours.running_var, count=6 * 72, momentum=0.3, eps=bn.eps
        )
        found = quantrain.batch_norm_act(
            b, statistics[0], statistics[1], ours.weight, ours.bias, scale, activation=activation, eps=bn.eps
        )
        torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(ours.running_mean, bn.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.running_var, bn.running_var, rtol=1e-5, atol=1e-6)
        grad = torch.randn_like(want)
        want.backward(grad)
        found.backward(grad)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=3e-5)
    torch.testing.assert_close(ours.weight.grad, bn.weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.bias.grad, bn.bias.grad, rtol=1e-4, atol=1e-3)


@DEVICES
@DTYPES
@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 8, 6, 4), (3, 5, 7, 7), (9, 7), (70, 40, 5, 8)], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6"])
def test_the_fake_quantized_result(device, dtype, layout, shape, affine, activation):
    """Codes and values of what the norm gives in float32; the mask is fake_quantize's and the activation's."""
    y, weight, bias, scale, _, grad = operands(shape, dtype, device, layout, 5)
    statistics = ops._batch_norm_statistics(y)
    low, high = ops._batch_norm_update_(
        statistics, weight, bias, scale, None, None, count=1, momentum=0.0, eps=1e-5, activation=activation, range=True
    )
    wide = y.float()
    z = quantrain.batch_norm_act(wide, statistics[0], statistics[1], weight, bias, scale, activation=activation)
    assert low == z.min() and high == z.max()  # what the extremes become is what the elements become
    limits = {"quant_min": 0, "quant_max": 255} if affine else {"quant_min": -8, "quant_max": 7}
    # Half the range, so that elements saturate on either side.
    step, zero = ops._qparams_from_range(low.view(1) / 2, high.view(1) / 2, symmetric=not affine, **limits)
    inputs = leaves(y, weight, bias, scale)
    found, codes = quantrain.batch_norm_act_fake_quantize(
        inputs[0], statistics[0], statistics[1], *inputs[1:], None, step, zero, activation=activation, **limits
    )
    want = quantrain.fake_quantize(z, step, zero, **limits)
    assert torch.equal(found.float(), want.to(dtype).float())
    code_type = torch.uint8 if affine else torch.int8
    assert torch.equal(codes, quantrain.quantize(z, step, zero, dtype=code_type, **limits))
    assert not codes.requires_grad and found.requires_grad
    found.backward(grad)
    unclamped = torch.round(z * (1 / step)) + zero
    passes = (unclamped >= limits["quant_min"]) & (unclamped <= limits["quant_max"])
    before = quantrain.batch_norm_act(wide, statistics[0], statistics[1], weight, bias, scale)
    slopes = {"identity": before == before, "relu": before > 0, "relu6": (before > 0) & (before < 6)}
    kept = torch.where(passes & slopes[activation], grad, 0.0).to(dtype)
    other = leaves(y, weight, bias, scale)
    quantrain.batch_norm_act(other[0], statistics[0], statistics[1], *other[1:]).backward(kept)
    for a, b in zip(inputs, other, strict=True):
        assert torch.equal(a.grad, b.grad)


@DEVICES
def test_constants_instead_of_the_batch_s_statistics(device):
    y, weight, bias, scale, residual, grad = operands((5, 6, 4, 4), device=device, residual=True)
    mean, variance = torch.randn(6, device=device), torch.rand(6, device=device) + 0.5
    inputs = leaves(y, weight, bias, residual)
    z = quantrain.batch_norm_act(
        inputs[0], mean, variance, inputs[1], inputs[2], None, inputs[3], activation="relu", batch_statistics=False
    )
    z.backward(grad)
    exact = doubles(y, weight, bias, residual)
    want = reference.batch_norm(*exact[:3], None, exact[3], "relu", 1e-5, doubles(mean, variance))
    want.backward(grad.cpu().double())
    close(z, want, 1e-5 * (1 + want.abs()), "result")
    for a, b in zip(inputs, exact, strict=True):
        close(a.grad, b.grad, 1e-4 * (1 + b.grad.abs()), "gradient")


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 16, 8, 8), (3, 5, 7, 7), (64, 40, 12, 12)], ids=str)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_cpu_and_cuda_agree_bit_for_bit_where_no_sum_is(layout, shape, activation):
    y, weight, bias, scale, _, _ = operands(shape, torch.bfloat16, "cpu", layout, 11)
    mean, variance = ops._batch_norm_statistics(y)[:2]
    found = [
        quantrain.batch_norm_act(*(t.to(d) for t in (y, mean, variance, weight, bias, scale)), activation=activation)
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(found[0], found[1].cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 256, 14, 14), (32, 24, 28, 28), (7, 2048, 7, 7), (128, 3, 33, 31)], ids=str)
def test_sums_repeat_and_are_those_of_float64_on_large_tensors(layout, shape):
    y, weight, bias, scale, _, grad = operands(shape, torch.bfloat16, "cuda", layout, 2)
    y = y + 30  # far from zero: a sum of squares about it would lose the variance
    kept = []
    for _ in range(2):
        inputs = leaves(y, weight, bias, scale)
        mean, variance, *_ = quantrain.batch_norm_statistics(y)
        quantrain.batch_norm_act(inputs[0], mean, variance, *inputs[1:], activation="relu").backward(grad)
        kept.append([mean, variance, *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    wide = y.double()
    close(mean, wide.mean((0, 2, 3)).cpu(), 1e-4, "mean")
    close(variance, wide.var((0, 2, 3), unbiased=False).cpu(), 1e-4 * (1 + wide.var((0, 2, 3))).cpu(), "variance")
    exact = doubles(y, weight, bias, scale)
    reference.batch_norm(*exact, None, "relu", 1e-5).backward(grad.cpu().double())
    for name, found, want in zip(("weight", "bias"), kept[0][3:5], (exact[1].grad, exact[2].grad), strict=True):
        close(found, want, 2e-3 * (want.abs().amax() + 1), name)


@DEVICES
def test_opcheck_and_compilers(device):
    y, weight, bias, scale, residual, grad = operands((4, 6, 4, 4), device=device, residual=True)
    statistics = ops._batch_norm_statistics(y)
    inputs = leaves(y, weight, bias, scale, residual)
    arguments = (inputs[0], statistics[0], statistics[1], *inputs[1:])
    opcheck(ops._batch_norm_statistics, (y,))
    opcheck(ops.batch_norm_act, arguments, {"activation": "relu"})
    step = torch.tensor([0.05], device=device)
    opcheck(ops.batch_norm_act_fake_quantize, (*arguments[:6], None, step), {"activation": "relu6"})
    running = [torch.zeros(6, device=device), torch.ones(6, device=device)]
    keywords = {"count": 64, "momentum": 0.1, "eps": 1e-5, "activation": "relu", "range": True}
    opcheck(ops._batch_norm_update_, (statistics, weight, bias, scale, *running), keywords)

    def run(y, weight, bias, scale, residual):
        mean, variance, _, _ = ops._batch_norm_statistics(y.detach())
        z = ops.batch_norm_act(y, mean, variance, weight, bias, scale, residual, activation="relu")
        return ops.batch_norm_act_fake_quantize(z, mean, variance, weight, bias, None, None, step, activation="relu")[0]

    run(*inputs).backward(grad)
    eager = [t.grad.clone() for t in inputs]
    for dynamic in (False, True):
        for t in inputs:
            t.grad = None
        torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*inputs).backward(grad)
        assert all(torch.equal(a, t.grad) for a, t in zip(eager, inputs, strict=True))


@DEVICES
def test_nan_and_inf_reach_results_and_statistics(device):
    y = torch.randn(4, 3, 5, 5, device=device)
    y[1, 1, 2, 2] = float("nan")
    y[2, 2, 0, 0] = float("inf")
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, variance, low, high = quantrain.batch_norm_statistics(y.contiguous(memory_format=layout))
        assert torch.isfinite(torch.stack([mean[0], variance[0], low[0], high[0]])).all()
        assert torch.isnan(torch.stack([mean[1], variance[1], low[1], high[1]])).all()
        assert not torch.isfinite(mean[2]) and not torch.isfinite(high[2])
        z = quantrain.batch_norm_act(y, mean, variance, activation="relu")
        assert torch.isfinite(z[:, 0]).all() and torch.isnan(z[:, 1]).all()


def test_empty_batches_pass():
    y = torch.empty(0, 3, 4, 4, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    z = quantrain.batch_norm_act(y, torch.zeros(3), torch.ones(3), weight)
    z.sum().backward()
    assert z.shape == y.shape and torch.equal(weight.grad, torch.zeros(3))


def test_second_derivatives_raise():
    y, weight, *_ = operands((4, 3, 2, 2))
    y.requires_grad_()
    mean, variance, *_ = quantrain.batch_norm_statistics(y)
    (grad,) = torch.autograd.grad(quantrain.batch_norm_act(y, mean, variance, weight).sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="batch_norm_act: expected one derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"input": torch.ones(3)}, ValueError, r"expected input \[N, C, ...\], got \[3\]"),
        ({"input": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "expected input of float32, float16 or bfloat16"),
        ({"mean": torch.ones(4)}, ValueError, r"expected mean of one element per channel, got \[4\]"),
        ({"variance": torch.ones(3, dtype=torch.float16)}, TypeError, "expected variance of float32"),
        ({"weight": torch.ones(3, dtype=torch.int32)}, TypeError, "expected weight of a floating type"),
        ({"residual": torch.ones(2, 4)}, ValueError, "expected residual of input's shape"),
        ({"residual": torch.ones(2, 3).half()}, TypeError, "expected residual of input's type"),
        ({"activation": "gelu"}, ValueError, "expected activation to be identity, relu"),
        ({"residual": torch.ones(2, 3), "activation": "silu"}, ValueError, "beside a residual, got silu"),
        ({"mean": torch.ones(3, requires_grad=True)}, ValueError, "expected mean and variance without requires_grad"),
    ],
)
def test_what_it_refuses(change, error, text):
    arguments = {"input": torch.ones(2, 3), "mean": torch.zeros(3), "variance": torch.ones(3)} | change
    with pytest.raises(error, match=f"batch_norm_act: .*{text}" if "requires" not in text else text):
        quantrain.batch_norm_act(**arguments)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"scale": torch.ones(3, 1)}, "expected one scale"),
        ({"activation": "silu"}, "expected activation identity, relu or relu6"),
        ({"quant_min": -512, "quant_max": 511}, "expected codes of at most 8 bits"),
        ({"quant_min": 0, "quant_max": 256}, "expected codes of at most 8 bits"),
        ({"scale": torch.tensor([0.0])}, "expected every scale to be positive"),
    ],
)
def test_what_the_fake_quantized_form_refuses(change, text):
    names = ("weight", "bias", "conv_scale", "residual")
    arguments = {"input": torch.ones(3, 3), "mean": torch.zeros(3), "variance": torch.ones(3)} | dict.fromkeys(names)
    with pytest.raises(ValueError, match=text):
        quantrain.batch_norm_act_fake_quantize(**(arguments | {"scale": torch.tensor([0.5])} | change))


# ---- the folded weight ----------------------------------------------------------------------------------------------


def folded(weight, gamma, variance, eps, limits, symmetric, dtype):
    """By the operators it stands for."""
    scale = gamma.float() / torch.sqrt(variance.float() + eps)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    shape = [len(gamma), *[1] * (weight.dim() - 1)]
    rounded = quantrain.fake_quantize_dynamic(weight.float() * scale.view(shape), shape, symmetric=symmetric, **limits)
    return rounded.to(dtype), scale


@DEVICES
@DTYPES
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (5, 1), (3, 64, 1, 1), (4, 7, 5), (2, 300), (16, 513, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("bits, symmetric", [(8, True), (4, False)])
def test_the_folded_weight_is_that_of_its_parts(device, dtype, shape, layout, bits, symmetric):
    torch.manual_seed(len(shape) + bits)
    weight = laid_out(torch.randn(shape, device=device).to(dtype), layout)
    gamma, variance = torch.randn(shape[0], device=device), torch.rand(shape[0], device=device) + 0.1
    gamma[0] = 0
    limits = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
    if not symmetric:
        limits = {"quant_min": 0, "quant_max": 2**bits - 1}
    ours, theirs = leaves(weight, gamma), leaves(weight.float(), gamma)
    found, scale = quantrain.fold_fake_quantize(*ours, variance, eps=1e-3, symmetric=symmetric, dtype=dtype, **limits)
    want, same = folded(*theirs, variance, 1e-3, limits, symmetric, dtype)
    torch.testing.assert_close(
        scale, same, rtol=3e-7, atol=0
    )  # PyTorch's variance + eps is a rounding away from float32's
    view = [shape[0], *[1] * (len(shape) - 1)]
    exact = quantrain.fake_quantize_dynamic(
        weight.float() * scale.detach().view(view), view, symmetric=symmetric, **limits
    )
    assert torch.equal(found, exact.to(dtype)) and found.dtype == dtype
    grads = torch.randn_like(want), torch.randn_like(scale)
    torch.autograd.backward([found, scale], grads)
    torch.autograd.backward([want, same], grads)
    step = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours[0].grad.float(), theirs[0].grad, rtol=step, atol=step)
    size = theirs[1].grad.abs().amax().item() + weight[0].numel() ** 0.5
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=step, atol=step * size)
    assert ours[1].grad[0] == 0


@DEVICES
def test_a_folded_row_with_nan_is_nan_and_compilers_agree(device):
    weight, gamma, variance = (
        torch.randn(4, 2, 3, 3, device=device),
        torch.ones(4, device=device),
        torch.ones(4, device=device),
    )
    weight[1, 0, 0, 0] = float("nan")
    variance[3] = float("nan")
    output, scale = quantrain.fold_fake_quantize(weight, gamma, variance)
    nan = torch.isnan(output).flatten(1)
    assert nan[1].all() and nan[3].all() and not nan[[0, 2]].any() and torch.isnan(scale[3])
    opcheck(
        ops.fold_fake_quantize, (weight[:1].clone().requires_grad_(), gamma[:1].clone().requires_grad_(), variance[:1])
    )
    narrow, _ = quantrain.fold_fake_quantize(weight, gamma, variance, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow[0], output[0].bfloat16())


@pytest.mark.cuda
def test_the_folded_weight_is_the_cpu_s():
    weight, gamma, variance = torch.randn(40, 33, 3, 3), torch.randn(40), torch.rand(40)
    here = quantrain.fold_fake_quantize(weight, gamma, variance)
    there = quantrain.fold_fake_quantize(weight.cuda(), gamma.cuda(), variance.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"weight": torch.ones(3)}, ValueError, r"expected weight \[O, ...\]"),
        ({"weight": torch.ones(3, 2, dtype=torch.int8)}, TypeError, "expected weight of float32"),
        ({"bn_weight": torch.ones(2)}, ValueError, "expected bn_weight of one element per row"),
        ({"running_var": torch.ones(3, dtype=torch.int32)}, TypeError, "expected running_var of a floating type"),
        ({"quant_min": 3, "quant_max": 3}, ValueError, "expected quant_min < quant_max"),
        ({"dtype": torch.int8}, TypeError, "expected dtype to be one of float32"),
    ],
)
def test_what_folding_refuses(change, error, text):
    arguments = {"weight": torch.ones(3, 2), "bn_weight": torch.ones(3), "running_var": torch.ones(3)} | change
    with pytest.raises(error, match=f"fold_fake_quantize: {text}"):
        quantrain.fold_fake_quantize(**arguments)
