"""Operators whose names begin with an underscore are reachable by name, so they check what they are given."""

import pytest
import torch

ops = torch.ops.quantrain
MASK = torch.zeros(512, dtype=torch.uint8)


@pytest.mark.parametrize(
    "grad, mask, stride, message",
    [
        (torch.randn(64, 64), MASK, [1, 1], "expected stride that fills memory"),
        (torch.randn(64, 64), MASK, [64], "expected stride that fills memory"),
        (torch.randn(64, 64), MASK, [-64, 1], "expected stride that fills memory"),
        (torch.randn(64, 64), MASK, [128, 1], "expected stride that fills memory"),
        (torch.randn(64, 64), MASK, [2**62, 1], "expected stride that fills memory"),
        (torch.randn(64, 64), MASK[:511], [64, 1], "expected mask of one bit per element"),
        (torch.randn(64, 64), MASK.reshape(8, 64), [64, 1], "expected mask of one bit per element"),
        (torch.randn(64, 64), MASK.to(torch.int8), [64, 1], "expected mask of uint8"),
        (torch.randn(64, 64), MASK.to("meta"), [64, 1], "expected mask of uint8 on"),
        (torch.ones(64, 64, dtype=torch.int32), MASK, [64, 1], "expected input of float32"),
    ],
)
def test_fake_quantize_backward_refuses(grad, mask, stride, message):
    with pytest.raises((ValueError, TypeError), match="_fake_quantize_backward: " + message):
        ops._fake_quantize_backward(grad, mask, stride)


def test_fake_quantize_backward_takes_any_dense_stride():
    grad = torch.randn(3, 1, 5)
    mask = torch.tensor([0b10101010, 0b01010101], dtype=torch.uint8)
    bits = torch.tensor([(mask[i // 8].item() >> i % 8) & 1 for i in range(15)])
    kept = ops._fake_quantize_backward(grad, mask, [1, 99, 3])  # columns first; the stride of size 1 says nothing
    want = torch.where(bits.reshape(5, 3).T.reshape(3, 1, 5) == 1, grad, 0.0)
    assert kept.equal(want) and kept.stride()[::2] == (1, 3)
    step = torch.stack([mask, mask], 1)[:, 0]  # a mask with a stride of its own
    assert ops._fake_quantize_backward(grad, step, [1, 99, 3]).equal(want)
    empty = ops._fake_quantize_backward(torch.randn(0, 3), torch.zeros(0, dtype=torch.uint8), [3, 1])
    assert empty.shape == (0, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_output": torch.randn(4, 7)}, "expected grad_output of input's shape"),
        ({"grad_output": torch.randn(8)}, "expected grad_output of input's shape"),
        ({"grad_output": torch.ones(4, 8, dtype=torch.int32)}, "expected grad_output of a floating type"),
        ({"grad_output": torch.randn(4, 8, device="meta")}, "expected grad_output of a floating type on"),
        ({"input": torch.ones(4, 8, dtype=torch.int8)}, "expected input of float32"),
        ({"scale": torch.ones(3, 1)}, "expected scale to divide input"),
        ({"scale": torch.ones(4, 1).half()}, "expected scale of float32"),
        ({"zero_point": torch.ones(2, 1)}, "expected zero_point to have the shape of scale"),
        ({"zero_point": torch.ones(4, 1).half()}, "expected zero_point of an integer type or float32"),
        ({"quant_min": 8}, "expected quant_min <= quant_max"),
    ],
)
def test_learnable_backward_refuses(change, message):
    arguments = {
        "grad_output": torch.randn(4, 8),
        "input": torch.randn(4, 8),
        "scale": torch.ones(4, 1),
        "zero_point": None,
        "quant_min": -8,
        "quant_max": 7,
        "grad_factor": 1.0,
    }
    ops._fake_quantize_learnable_backward(**arguments)
    with pytest.raises((ValueError, TypeError), match="_fake_quantize_learnable_backward: " + message):
        ops._fake_quantize_learnable_backward(**{**arguments, **change})


def test_reflect_rows_refuses_positions_outside():
    order = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"_reflect_rows: expected order in \[0, 2\), got 2"):
        ops._reflect_rows(torch.randn(2, 3), order, torch.zeros(2, 4))
