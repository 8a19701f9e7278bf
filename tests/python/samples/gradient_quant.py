"""The one list of samples that every kind of check of the gradient_quant family runs over."""

from dataclasses import dataclass, field

import pytest
import torch
from reference import gradient_quant as reference
from samples.fake_quant import DTYPES, assert_same, in_each_dtype, on_each_device

import quantrain

__all__ = ["DTYPES", "assert_same", "in_each_dtype", "on_each_device"]


@dataclass(frozen=True)
class Quantizer:
    """A quantizer with its options, as the operators take them."""

    quantizer: str
    bits: int = 8
    preserve_zero: bool = False

    def __str__(self):
        return f"{self.quantizer}{'_zero' if self.preserve_zero else ''}_{self.bits}"

    @property
    def rule(self):
        """The keywords of the oracle's functions too."""
        return {"bits": self.bits, "quantizer": self.quantizer, "preserve_zero": self.preserve_zero}


@dataclass
class Sample:
    name: str
    shape: tuple
    kind: str = "normal"
    rows: str = "sample"
    layout: str = "contiguous"
    max_group: int = 128
    seed: int = field(default=0)

    def __str__(self):
        return self.name

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(100 * seed + self.seed)
        x = torch.randn(self.shape, generator=g)
        matrix = reference.flatten(x, self.rows)  # a view: x changes with it
        n = matrix.shape[0]
        if self.kind == "heavy":  # row ranges over three decades
            matrix *= torch.exp(2 * torch.randn(n, 1, generator=g)).clamp(max=1e3)
        elif self.kind == "one_row":
            matrix[1:] *= 1e-3
        elif self.kind == "few_rows":
            matrix[torch.randperm(n, generator=g)[8:]] *= 1e-3
        elif self.kind == "sparse":
            matrix *= torch.rand(matrix.shape, generator=g) < 0.5
        elif self.kind == "zero_rows":
            matrix[torch.rand(n, generator=g) < 0.4] = 0
        elif self.kind == "positive":
            matrix.abs_().add_(0.5)
        elif self.kind == "negative":
            matrix.abs_().add_(0.5).neg_()
        elif self.kind == "constant_rows":
            matrix.copy_(matrix[:, :1].clone().expand_as(matrix))
        elif self.kind == "equal_rows":  # ties in the order of the rows
            matrix.copy_(matrix[:1].clone().expand_as(matrix))
        elif self.kind == "zero":
            matrix.zero_()
        elif self.kind != "normal":
            raise ValueError(self.kind)
        return self._lay_out(x.to(device=device, dtype=dtype))

    def _lay_out(self, x):
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "strided":
            wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
            wide[..., ::2] = x
            return wide[..., ::2]
        if self.layout == "expanded":
            return x[:1].expand(x.shape)
        if self.layout == "offset":
            flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
            flat[1:] = x.flatten()
            return flat[1:].view(x.shape)  # not aligned to 16 bytes
        return x

    def matrix(self, grad, in_memory=False):
        """X [N, D] of a gradient made by make(), on the CPU; `in_memory`: its columns in the order of the memory."""
        if in_memory and self.layout == "channels_last":
            grad = grad.permute(0, 2, 3, 1)
        return reference.flatten(grad.cpu().contiguous(), self.rows)

    @property
    def options(self):
        return {"rows": self.rows, "max_group": self.max_group}


SAMPLES = [
    Sample("matrix", (24, 40)),
    Sample("odd", (37, 19)),
    Sample("one_row_only", (1, 33)),
    Sample("two_rows", (2, 17)),
    Sample("three_rows", (3, 9)),
    Sample("four_rows", (4, 8), "heavy"),
    Sample("one_column", (17, 1)),
    Sample("one_element", (1, 1)),
    Sample("vector", (9,)),
    Sample("vector_token", (9,), rows="token"),
    Sample("conv", (16, 3, 5, 5), "heavy"),
    Sample("tokens", (2, 9, 65), "heavy", rows="token"),
    Sample("tokens_4d", (2, 3, 5, 12), rows="token"),
    Sample("tokens_as_samples", (6, 9, 13)),
    Sample("heavy", (64, 48), "heavy"),
    Sample("big_row", (128, 33), "one_row"),
    Sample("few_big_rows", (128, 20), "few_rows"),
    Sample("sparse", (32, 50), "sparse"),
    Sample("zero_rows", (41, 24), "zero_rows"),
    Sample("zero", (7, 11), "zero"),
    Sample("positive", (12, 31), "positive"),
    Sample("negative", (12, 31), "negative"),
    Sample("constant_rows", (9, 14), "constant_rows"),
    Sample("equal_rows", (11, 14), "equal_rows"),
    Sample("blocks", (300, 24), "heavy"),
    Sample("blocks_of_7", (50, 16), "heavy", max_group=7),
    Sample("blocks_of_3", (23, 16), "heavy", max_group=3),
    Sample("blocks_of_2", (4, 16), "heavy", max_group=3),
    Sample("block_of_256", (256, 9), "one_row", max_group=256),
    Sample("channels_last", (8, 4, 5, 5), "heavy", layout="channels_last"),
    Sample("transposed", (24, 40), "heavy", layout="transposed"),
    Sample("strided", (24, 40), "heavy", layout="strided"),
    Sample("expanded", (24, 40), layout="expanded"),
    Sample("offset", (24, 40), "heavy", layout="offset"),
    Sample("large", (130, 1031), "heavy"),
    Sample("long_rows", (3, 20001), "heavy"),
]
# One of each way through the kernels, for the checks that take long.
FEW = [s for s in SAMPLES if s.name in {"odd", "tokens", "zero_rows", "blocks_of_7", "channels_last"}]

QUANTIZERS = [
    Quantizer("per_tensor"),
    Quantizer("per_sample", 5),
    Quantizer("per_sample", 4, preserve_zero=True),
    Quantizer("per_channel"),
    Quantizer("householder", 5),
]
EVERY_BITS = [Quantizer(q.quantizer, bits, q.preserve_zero) for q in QUANTIZERS for bits in range(2, 9)]

with_each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)


def each(samples):
    return pytest.mark.parametrize("sample", samples, ids=str)


def simulate(grad, quantizer, sample=None, **keywords):
    """quantize_gradient, seeded where `seed` and `offset` are given."""
    keywords = {**(sample.options if sample else {}), **keywords}
    op = torch.ops.quantrain.quantize_gradient
    op = op.seeded if "seed" in keywords else op.default
    return op(grad, quantizer.bits, quantizer.quantizer, preserve_zero=quantizer.preserve_zero, **keywords)


def encode(grad, quantizer, sample=None, **keywords):
    """quantize_gradient_codes, seeded where `seed` and `offset` are given: (codes, scale, offset, order, reflector)."""
    keywords = {**(sample.options if sample else {}), **keywords}
    op = torch.ops.quantrain.quantize_gradient_codes
    op = op.seeded if "seed" in keywords else op.default
    result = op(grad, quantizer.bits, quantizer.quantizer, preserve_zero=quantizer.preserve_zero, **keywords)
    return quantrain.QuantizedGradient(*result)
