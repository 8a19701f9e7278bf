"""Arguments as people write them: any integer type, plain numbers, axes; everything else in our own words."""

import numpy as np
import pytest
import torch

import quantrain
from quantrain import (
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_dynamic,
    fake_quantize_learnable,
    fixed_point_add,
    fixed_point_conv2d,
    fixed_point_conv2d_requantize,
    fixed_point_fraction_length,
    fixed_point_max_pool2d,
    fixed_point_quantize,
    fixed_point_requantize,
    int8_mm,
    int8_quantize_rows,
    quantize,
)

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_zero_point_of_any_integer_type(x, dtype, device):
    x = x.to(device)
    scale = torch.full((4, 1), 0.1, device=device)
    point = torch.tensor([[1], [2], [3], [4]], device=device)
    want = fake_quantize(x, scale, point.int(), quant_min=0, quant_max=15)
    assert fake_quantize(x, scale, point.to(dtype), quant_min=0, quant_max=15).equal(want)
    assert fake_quantize_learnable(x, scale, point.to(dtype), quant_min=0, quant_max=15).equal(want)
    codes = quantize(x, scale, point.to(dtype), quant_min=0, quant_max=15)
    assert dequantize(codes, scale, point.to(dtype)).equal(want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_fraction_length_and_shift_of_any_integer_type(x, dtype, device):
    x = x.to(device)
    lengths = torch.tensor([[1], [2], [3], [4]], device=device)
    assert fixed_point_quantize(x, lengths.to(dtype)).equal(fixed_point_quantize(x, lengths.int()))
    previous = fixed_point_fraction_length(x, axis=0)
    kept = fixed_point_fraction_length(x * 4, axis=0, previous=previous.to(dtype), hysteresis=8.0)
    assert kept.equal(previous)
    sums = (x * 1000).int()
    want = fixed_point_requantize(sums, lengths.int() + 5, 3)
    assert fixed_point_requantize(sums, (lengths + 5).to(dtype), 3).equal(want)
    image = torch.arange(64, dtype=torch.uint8, device=device).reshape(1, 4, 4, 4)
    weight, shift = torch.ones(2, 4, 1, 1, dtype=torch.int8, device=device), torch.tensor([1, 2], device=device)
    want = fixed_point_conv2d_requantize(image, weight, None, shift.int())
    assert fixed_point_conv2d_requantize(image, weight, None, shift.to(dtype)).equal(want)
    one, two = torch.tensor([1], device=device), torch.tensor([2], device=device)
    want = fixed_point_add(image, image, one.int(), two.int())
    assert fixed_point_add(image, image, one.to(dtype), two.to(dtype)).equal(want)


def test_int64_values_do_not_wrap(x):
    scale = torch.tensor([0.1])
    with pytest.raises(ValueError, match=r"fake_quantize: expected zero_point in \[-128, 127\], got 4294967296"):
        fake_quantize(x, scale, torch.tensor([2**32]))
    with pytest.raises(ValueError, match=r"fixed_point_quantize: expected fraction_length in \[0, 7\]"):
        fixed_point_quantize(x, torch.tensor([2**32]))
    with pytest.raises(ValueError, match=r"expected shift in \[-31, 31\], got 4294967296"):
        fixed_point_conv2d_requantize(
            torch.zeros(1, 1, 1, 1, dtype=torch.uint8),
            torch.zeros(1, 1, 1, 1, dtype=torch.int8),
            None,
            torch.tensor([2**32]),
        )


def test_plain_numbers(x):
    scale, point = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    want = fake_quantize(x, scale, point, quant_min=0, quant_max=15)
    assert fake_quantize(x, 0.1, 3, quant_min=0, quant_max=15).equal(want)
    assert fake_quantize(x, np.float64(0.1), 3, quant_min=np.int64(0), quant_max=np.int64(15)).equal(want)
    assert fake_quantize(x, torch.full((4, 1), 0.1), 3, quant_min=0, quant_max=15).equal(want)
    assert dequantize(quantize(x, 0.1, 3, quant_min=0, quant_max=15), 0.1, 3).equal(want)
    assert fixed_point_quantize(x, 3).equal(fixed_point_quantize(x, torch.tensor([3])))
    image, weight = torch.full((1, 1, 2, 2), 6, dtype=torch.uint8), torch.ones(1, 1, 1, 1, dtype=torch.int8)
    assert fixed_point_conv2d_requantize(image, weight, None, 1).unique().tolist() == [3]
    assert fixed_point_add(image, image, 1, 2).unique().tolist() == [18]
    assert fixed_point_conv2d(image, weight, stride=[2, 2]).shape == (1, 1, 1, 1)


def test_axis(x):
    scale, point = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 2, 3, 4])
    want = fake_quantize(x, scale[:, None], point[:, None], quant_min=0, quant_max=15)
    assert fake_quantize(x, scale, point, quant_min=0, quant_max=15, axis=0).equal(want)
    assert fake_quantize(x, scale, point, quant_min=0, quant_max=15, axis=-2).equal(want)
    with pytest.raises(ValueError, match=r"fake_quantize: expected axis in \[-2, 1\], got 2"):
        fake_quantize(x, scale, axis=2)
    with pytest.raises(ValueError, match=r"fake_quantize: expected a 1-D scale with axis, got shape \[4, 1\]"):
        fake_quantize(x, scale[:, None], axis=1)
    with pytest.raises(ValueError, match=r"quantize: expected a 1-D zero_point with axis, got shape \[4, 1\]"):
        quantize(x, scale, point[:, None], axis=0)
    with pytest.raises(ValueError, match=r"fixed_point_quantize: expected a 1-D fraction_length with axis"):
        fixed_point_quantize(x, torch.ones(4, 1, dtype=torch.int32), axis=0)
    with pytest.raises(ValueError, match=r"fake_quantize: expected scale to divide input at dimension 1, got 4 and 6"):
        fake_quantize(x, scale, axis=1)
    with pytest.raises(TypeError, match="fake_quantize: expected axis to be an integer, got 'rows'"):
        fake_quantize(x, scale, axis="rows")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: fake_quantize(x, [0.1]), "fake_quantize: expected scale to be a tensor or a number, got list"),
        (
            lambda x: fake_quantize(x, np.ones(1)),
            "fake_quantize: expected scale to be a tensor or a number, got ndarray",
        ),
        (lambda x: fake_quantize(x, True), "fake_quantize: expected scale to be a tensor or a number, got bool"),
        (lambda x: fake_quantize(x.tolist(), 0.1), "fake_quantize: expected input to be a tensor, got list"),
        (lambda x: fake_quantize(x, 0.1, 1.5), "fake_quantize: expected zero_point to be an integer, got 1.5"),
        (
            lambda x: fake_quantize(x, 0.1, torch.ones(1)),
            "fake_quantize: expected zero_point of an integer type, got Float",
        ),
        (
            lambda x: fake_quantize(x, 0.1, quant_min=-8.0),
            "fake_quantize: expected quant_min to be an integer, got -8.0",
        ),
        (lambda x: fake_quantize(x, 0.1, quant_max="7"), "fake_quantize: expected quant_max to be an integer, got '7'"),
        (lambda x: fake_quantize(x, torch.ones(1).half()), "fake_quantize: expected scale of float32, got Half"),
        (
            lambda x: fake_quantize_learnable(x, 0.1),
            "fake_quantize_learnable: expected scale to be a tensor, got float",
        ),
        (lambda x: fake_quantize_dynamic(x, 4), "fake_quantize_dynamic: expected scale_shape to be a sequence"),
        (lambda x: choose_qparams(x, "ab"), "choose_qparams: expected scale_shape to be a sequence"),
        (lambda x: choose_qparams(x, [4, 1.0]), "choose_qparams: expected scale_shape to be an integer, got 1.0"),
        (lambda x: choose_qparams(None, [1]), "choose_qparams: expected input to be a tensor, got NoneType"),
        (lambda x: quantize(x, 0.1, dtype=torch.int64), "quantize: expected dtype to be one of"),
        (lambda x: quantize(x, 0.1, dtype="int8"), "quantize: expected dtype to be one of"),
        (lambda x: dequantize(x, 0.1), "dequantize: expected input of int8, uint8, int16 or int32, got Float"),
        (lambda x: fixed_point_quantize(x, 1.5), "fixed_point_quantize: expected fraction_length to be an integer"),
        (lambda x: fixed_point_quantize(x, [1]), "fixed_point_quantize: expected fraction_length to be a tensor or"),
        (lambda x: fixed_point_quantize(x, x), "fixed_point_quantize: expected fraction_length of an integer type"),
        (lambda x: fixed_point_max_pool2d(x, 2.5, 1), "fixed_point_max_pool2d: expected kernel_size to be an integer"),
        (lambda x: int8_quantize_rows([1.0]), "int8_quantize_rows: expected input to be a tensor, got list"),
        (lambda x: int8_mm(x, None), "int8_mm: expected b to be a tensor, got NoneType"),
    ],
)
def test_everything_else_raises_in_our_words(x, call, message):
    with pytest.raises(TypeError) as error:
        call(x)
    assert message in str(error.value)


def test_sizes_that_would_wrap_are_refused():
    image, weight = torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(4, 4, 1, 1, dtype=torch.int8)
    for padding in (2**63 - 1, 2**62, 2**31):
        with pytest.raises(ValueError, match=r"fixed_point_conv2d: expected padding of at most 2147483647"):
            fixed_point_conv2d(image, weight, padding=padding)
        with pytest.raises(ValueError, match="fixed_point_max_pool2d: expected padding of at most half the kernel"):
            fixed_point_max_pool2d(image, 3, 1, padding)
    with pytest.raises(ValueError, match="fixed_point_max_pool2d: expected padding of at most 2147483647"):
        fixed_point_max_pool2d(image, 2**63 - 1, 1, 2**62 - 1)
    with pytest.raises(ValueError, match="fixed_point_conv2d: expected stride of at most 2147483647"):
        fixed_point_conv2d(image, weight, stride=2**63 - 1)
    assert fixed_point_conv2d(image, weight, stride=2**31 - 1).shape == (1, 4, 1, 1)
    for groups in (2**62, 2**63 - 1):
        with pytest.raises(ValueError, match="fixed_point_conv2d: expected input of C channels"):
            fixed_point_conv2d(image, weight, groups=groups)
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    for stride, dilation in (([], [1, 1]), ([1, 1], []), ([1, 1, 1], [1, 1])):
        with pytest.raises(ValueError, match="fqt_conv2d: expected two sizes each for stride, padding and dilation"):
            torch.ops.quantrain.fqt_conv2d.padding(x, w, None, stride, "same", dilation)
        with pytest.raises(ValueError, match="fqt_conv2d: expected two sizes each for stride, padding and dilation"):
            torch.ops.quantrain.fqt_conv2d(x, w, None, stride, [0, 0], dilation)
    with pytest.raises(ValueError, match=r"fqt_conv2d: expected dilation in \[1, 2147483647\]"):
        quantrain.fqt_conv2d(x, w, dilation=2**62, padding="same")
    with pytest.raises(ValueError, match="fqt_conv2d: expected stride in"):
        quantrain.fqt_conv2d(x, w, stride=0)


def test_float64_is_taken_as_float32(x):
    wide = (x.double() * 1.0000000001).requires_grad_()
    scale = torch.full((4, 1), 0.1)
    y = fake_quantize(wide, scale, quant_min=-8, quant_max=7)
    assert y.dtype == torch.float64 and y.equal(fake_quantize(x, scale, quant_min=-8, quant_max=7).double())
    grad = torch.randn(4, 6, dtype=torch.float64)
    y.backward(grad)
    codes = (wide.detach().float() * (1 / scale)).round()
    assert wide.grad.equal(torch.where((codes >= -8) & (codes <= 7), grad, 0.0))  # not rounded to float32
    assert choose_qparams(wide, [4, 1])[0].equal(choose_qparams(x, [4, 1])[0])
    assert fake_quantize_dynamic(wide, [4, 1]).equal(fake_quantize_dynamic(x, [4, 1]).double())
    assert quantize(wide, scale).equal(quantize(x, scale))
    assert fixed_point_quantize(wide, 4).equal(fixed_point_quantize(x, 4).double())
    learned = torch.full((4, 1), 0.1, dtype=torch.float64, requires_grad=True)
    fake_quantize_learnable(wide, learned, quant_min=-8, quant_max=7).sum().backward()
    single = torch.full((4, 1), 0.1, requires_grad=True)
    fake_quantize_learnable(x, single, quant_min=-8, quant_max=7).sum().backward()
    assert learned.grad.dtype == torch.float64 and learned.grad.float().equal(single.grad)


def test_gradcheck_around_a_quantizer():
    # Sums through the quantizer are constant between its steps; what is around it has a derivative to check.
    torch.manual_seed(0)
    a = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 5, dtype=torch.float64)
    fixed = fake_quantize(b, torch.tensor([0.25]))
    assert torch.autograd.gradcheck(lambda t: (t * fixed).tanh(), (a,))


def test_one_integer_serves_every_scale(x):
    scale = torch.full((4, 1), 0.1)
    want = fake_quantize(x, scale, torch.full((4, 1), 3), quant_min=0, quant_max=15)
    for point in (torch.tensor(3), torch.tensor([3]), np.int64(3)):
        assert fake_quantize(x, scale, point, quant_min=0, quant_max=15).equal(want)
    assert fake_quantize(x, scale.flatten(), torch.tensor(3), quant_min=0, quant_max=15, axis=0).equal(want)
    for point in (torch.tensor(3), torch.tensor([3]), 3):
        assert fake_quantize(x, np.float32(0.1), point, quant_min=0, quant_max=15).equal(want)
        assert fake_quantize_learnable(x, scale, torch.tensor(3), quant_min=0, quant_max=15).equal(want)
        assert dequantize(quantize(x, scale, point, quant_min=0, quant_max=15), scale, point).equal(want)
    learned = scale.clone().requires_grad_()
    fake_quantize_learnable(x, learned, torch.tensor(3), quant_min=0, quant_max=15).sum().backward()
    full = scale.clone().requires_grad_()
    fake_quantize_learnable(x, full, torch.full((4, 1), 3), quant_min=0, quant_max=15).sum().backward()
    assert learned.grad.equal(full.grad)


@pytest.mark.parametrize("value", [1e300, -1e300, 10**400])
def test_numbers_beyond_float32_are_refused(x, value):
    with pytest.raises(ValueError, match="fake_quantize: expected scale to fit float32"):
        fake_quantize(x, value)


def test_scales_are_finite(x):
    with pytest.raises(ValueError, match="fake_quantize: expected every scale to be positive and finite, got inf"):
        fake_quantize(x, float("inf"))


def test_a_range_wider_than_float32_has_its_own_scale():
    scale, point = choose_qparams(torch.tensor([3e38, -3e38]), [1], symmetric=False, quant_min=0, quant_max=255)
    assert abs(scale.item() / (6e38 / 255) - 1) < 1e-6 and point.item() in (127, 128)
    y = fake_quantize_dynamic(torch.tensor([3e38, -3e38]), [1], symmetric=False, quant_min=0, quant_max=255)
    assert torch.allclose(y, torch.tensor([3e38, -3e38]), rtol=0.01)


def test_block_with_infinity_or_nan_is_nan():
    for bad in (float("inf"), float("-inf"), float("nan")):
        block = torch.tensor([[1.0, bad], [1.0, 2.0]], requires_grad=True)
        for symmetric in (True, False):
            scale, point = choose_qparams(
                block, [2, 1], symmetric=symmetric, quant_min=0 if not symmetric else -8, quant_max=7
            )
            assert scale[0].isnan() and point[0].item() == 0 and scale[1] > 0
            y = fake_quantize_dynamic(
                block, [2, 1], symmetric=symmetric, quant_min=0 if not symmetric else -8, quant_max=7
            )
            assert y[0].isnan().all() and not y[1].isnan().any()
            (grad,) = torch.autograd.grad(y, block, torch.ones(2, 2))
            assert grad.tolist() == [[0.0, 0.0], [1.0, 1.0]]
