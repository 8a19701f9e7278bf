"""The one list of samples that every kind of check of the int8 family runs over."""

import pytest
import torch
from samples import gradient_quant
from samples.fake_quant import DTYPES, assert_same, in_each_dtype, on_each_device

__all__ = ["DTYPES", "assert_same", "in_each_dtype", "on_each_device"]

NAN, INF = float("nan"), float("inf")


class Sample(gradient_quant.Sample):
    """A matrix to be quantized, by rows and by columns, and factors for its rows and columns."""

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(100 * seed + self.seed)
        x = torch.randn(self.shape, generator=g)
        matrix = x.view(-1, self.shape[-1])  # x changes with it
        rows, columns = matrix.shape
        if self.kind == "heavy":  # rows and columns over three decades
            matrix *= torch.exp(2 * torch.randn(rows, 1, generator=g)).clamp(max=30)
            matrix *= torch.exp(2 * torch.randn(1, columns, generator=g)).clamp(max=30)
        elif self.kind == "zeros":  # whole rows and columns of them
            matrix[torch.rand(rows, generator=g) < 0.4] = 0
            matrix[:, torch.rand(columns, generator=g) < 0.4] = 0
        elif self.kind == "zero":
            matrix.zero_()
        elif self.kind == "ties":  # the scale is 1, the values are halves
            matrix.copy_(torch.randint(-253, 254, matrix.shape, generator=g) / 2)
            matrix[:, 0] = 127
            matrix[0] = -127
        elif self.kind == "constant":
            matrix.fill_(0.37)
        elif self.kind == "subnormal":
            matrix *= 2.0**-140
        elif self.kind == "huge":
            matrix.copy_(matrix.sign() * torch.finfo(dtype).max)
        elif self.kind == "not_finite":
            for i, value in enumerate((NAN, INF, -INF, NAN)):
                matrix[3 * i + 1, (5 * i + 2) % columns] = value
        elif self.kind != "normal":
            raise ValueError(self.kind)
        return self._lay_out(x.to(device=device, dtype=dtype))

    def factors(self, device="cpu", seed=0):
        """(column_factor [K], row_factor [M])."""
        g = torch.Generator().manual_seed(7 + seed)
        rows, columns = self.rows_and_columns
        return tuple(torch.exp(torch.randn(n, generator=g)).to(device) for n in (columns, rows))

    @property
    def rows_and_columns(self):
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows, self.shape[-1]


SAMPLES = [
    Sample("matrix", (24, 40)),
    Sample("tiles", (64, 64)),
    Sample("odd", (37, 19)),
    Sample("over_tiles", (129, 193), "heavy"),
    Sample("under_tiles", (63, 127), "heavy"),
    Sample("one_row", (1, 33)),
    Sample("one_column", (17, 1)),
    Sample("one_element", (1, 1)),
    Sample("two_rows", (2, 65)),
    Sample("three_rows", (3, 9)),
    Sample("vector", (131,)),
    Sample("tokens", (2, 9, 65), "heavy"),
    Sample("tokens_4d", (2, 3, 5, 12)),
    Sample("heavy", (70, 300), "heavy"),
    Sample("zeros", (41, 24), "zeros"),
    Sample("zero", (7, 11), "zero"),
    Sample("ties", (50, 130), "ties"),
    Sample("constant", (9, 14), "constant"),
    Sample("subnormal", (9, 140), "subnormal"),
    Sample("huge", (9, 14), "huge"),
    Sample("not_finite", (20, 200), "not_finite"),
    Sample("transposed", (24, 40), "heavy", layout="transposed"),
    Sample("strided", (24, 40), "heavy", layout="strided"),
    Sample("expanded", (24, 40), layout="expanded"),
    Sample("offset", (24, 40), "heavy", layout="offset"),
    Sample("many_rows", (1031, 130), "heavy"),
    Sample("long_rows", (3, 20001), "heavy"),
]
# One of each way through the kernels, for the checks that take long.
FEW = [s for s in SAMPLES if s.name in {"odd", "tokens", "over_tiles", "zeros", "transposed"}]
EMPTY = [Sample("no_rows", (0, 8)), Sample("no_tokens", (2, 0, 8)), Sample("no_samples", (0, 3, 5))]


def each(samples):
    return pytest.mark.parametrize("sample", samples, ids=str)


def codes(shape, seed=0, low=-127, device="cpu"):
    """Random int8 codes."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=g).to(device)


def scales(n, seed=0, device="cpu"):
    """Random scales over three decades."""
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.exp(torch.randn(n, generator=g)).mul_(0.01).to(device)


def assert_all_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same(a.cpu(), b.cpu())
