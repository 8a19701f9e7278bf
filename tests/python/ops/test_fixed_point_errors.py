"""What the operators refuse: each message names the operator, the rule and the value, in eager, on Meta and so under a compiler."""

import re

import pytest
import torch

import quantrain

X = torch.randn(4, 6)
F = torch.tensor([5], dtype=torch.int32)
Q, L, R = (
    quantrain.fixed_point_quantize,
    quantrain.fixed_point_fraction_length,
    quantrain.fixed_point_requantize,
)

CASES = [
    (ValueError, "fixed_point_quantize: expected word_length in [2, 16], got 1", lambda x, f: Q(x, f, word_length=1)),
    (ValueError, "fixed_point_quantize: expected word_length in [2, 16], got 17", lambda x, f: Q(x, f, word_length=17)),
    (ValueError, "fixed_point_quantize: expected fraction_length to divide input at dimension 1, got 4 and 6", lambda x, f: Q(x, f.expand(4, 4))),
    (ValueError, "fixed_point_quantize: expected fraction_length to have one element or the input's 2 dimensions, got 1 dimensions", lambda x, f: Q(x, f.expand(6))),
    (TypeError, "fixed_point_quantize: expected fraction_length of an integer type, got Float", lambda x, f: Q(x, f.float())),
    (ValueError, "fixed_point_fraction_length: expected word_length in [2, 16], got 32", lambda x, f: L(x, word_length=32)),
    (ValueError, 'fixed_point_fraction_length: expected method "std", "rms" or "mse", got "mae"', lambda x, f: L(x, method="mae")),
    (ValueError, "fixed_point_fraction_length: expected axis in [-2, 1], got 2", lambda x, f: L(x, axis=2)),
    (ValueError, "fixed_point_fraction_length: expected hysteresis to be finite and not negative, got -0.5", lambda x, f: L(x, hysteresis=-0.5)),
    (ValueError, "fixed_point_fraction_length: expected previous to have the result's shape [4, 1], got [1]", lambda x, f: L(x, axis=0, previous=f)),
    (TypeError, "fixed_point_fraction_length: expected previous of an integer type, got Float", lambda x, f: L(x, previous=f.float())),
    (TypeError, "fixed_point_fraction_length: expected input of float32, float16, bfloat16 or float64, got Int", lambda x, f: L(x.int())),
    (TypeError, "fixed_point_requantize: expected accumulator of int32, got Float", lambda x, f: R(x, f, 3)),
    (TypeError, "fixed_point_requantize: expected accumulator_fraction_length of an integer type, got Float", lambda x, f: R(x.int(), f.float(), 3)),
    (ValueError, "fixed_point_requantize: expected accumulator_fraction_length to divide input at dimension 0, got 3 and 4", lambda x, f: R(x.int(), f.expand(3, 1), 3)),
    (ValueError, "fixed_point_requantize: expected fraction_length in [0, 7], got 8", lambda x, f: R(x.int(), f, 8)),
    (ValueError, "fixed_point_requantize: expected fraction_length in [0, 8], got -1", lambda x, f: R(x.int(), f, -1, signed=False)),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("error", "message", "call"), CASES, ids=[c[1][:70] for c in CASES])
def test_shapes_and_types_are_refused_everywhere(error, message, call, device):
    with pytest.raises(error, match=re.escape(message)):
        call(X.to(device), F.to(device))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("bad", "keywords", "longest"),
    [(8, {}, 7), (-1, {}, 7), (9, {"signed": False}, 8), (4, {"word_length": 4}, 3)],
)
def test_cpu_refuses_a_fraction_length_out_of_range(bad, keywords, longest, requires_grad):
    lengths = torch.tensor([[0], [1], [bad], [2]], dtype=torch.int32)
    message = f"fixed_point_quantize: expected fraction_length in [0, {longest}], got {bad} at index 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        Q(X.clone().requires_grad_(requires_grad), lengths, **keywords)


def test_cpu_refuses_other_lengths_out_of_range():
    message = "fixed_point_fraction_length: expected previous in [0, 7], got 9 at index 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        L(X, previous=torch.tensor([9], dtype=torch.int32))
    message = "fixed_point_requantize: expected accumulator_fraction_length in [0, 31], got 32 at index 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        R(X.int(), 32, 5)


INTS = [-(2**31), -100, -1, 8, 16, 17, 127, 128, 2**31 - 1]


@pytest.mark.cuda
@pytest.mark.parametrize("bad", INTS)
def test_cuda_is_defined_where_a_fraction_length_is_out_of_range(bad):
    lengths = torch.tensor([[0], [1], [bad], [2]], dtype=torch.int32, device="cuda")
    y = Q(X.cuda(), lengths)
    assert torch.isnan(y[2]).all() and not torch.isnan(y[[0, 1, 3]]).any()
    accumulator = torch.tensor([[0, 1, -1, 2**31 - 1]] * 4, dtype=torch.int32, device="cuda")
    codes = R(accumulator, lengths, 5)
    if bad < 0:
        assert codes[2].tolist() == [0, 127 if bad < -1 else 64, -127 if bad < -1 else -64, 127]
    elif bad > 40:
        assert codes[2].tolist() == [0, 0, 0, 0]
    previous = torch.tensor([bad], dtype=torch.int32, device="cuda")
    for method in ("std", "mse"):
        kept = L(X.cuda(), previous=previous, hysteresis=3.0, method=method)
        assert_in_range(kept.item())


def assert_in_range(length):
    assert 0 <= length <= 7


def test_lengths_on_another_device():
    with pytest.raises(TypeError, match="fixed_point_quantize: expected fraction_length on the input's device cpu"):
        Q(X, F.to("meta"))
