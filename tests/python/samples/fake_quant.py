"""The one list of samples that every kind of check of the fake_quant family runs over."""

from dataclasses import dataclass

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass
class Sample:
    name: str
    shape: tuple
    scale_shape: tuple
    quant_min: int = -128
    quant_max: int = 127
    affine: bool = False
    layout: str = "contiguous"

    def __str__(self):
        return self.name

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        """(input, scale, zero_point or None): about a tenth of the elements saturate."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=g)
        half = (self.quant_max - self.quant_min + 1) / 2
        scale = (torch.rand(self.scale_shape, generator=g) + 0.5) * 1.6 / half
        zero_point = None
        if self.affine:
            zero_point = torch.randint(
                self.quant_min, self.quant_max + 1, self.scale_shape, generator=g, dtype=torch.int32
            )
        x = self._lay_out(x.to(device=device, dtype=dtype))
        return x, scale.to(device), None if zero_point is None else zero_point.to(device)

    def _lay_out(self, x):
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "strided":
            wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
            wide[..., ::2] = x
            return wide[..., ::2]
        if self.layout == "offset":
            flat = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
            flat[1:] = x.flatten()
            return flat[1:].view(x.shape)  # not aligned to 16 bytes
        return x

    @property
    def range(self):
        return {"quant_min": self.quant_min, "quant_max": self.quant_max}


SAMPLES = [
    Sample("per_tensor", (37, 19), (1,)),
    Sample("per_tensor_affine", (64, 129), (1,), 0, 255, affine=True),
    Sample("per_tensor_scalar_shape", (5, 7), ()),
    Sample("zero_dim", (), ()),
    Sample("one_element", (1,), (1,)),
    Sample("empty", (0, 4), (1,)),
    Sample("channel_0", (33, 48), (33, 1)),
    Sample("channel_0_odd", (6, 13), (6, 1), affine=True),
    Sample("channel_1_of_4", (3, 8, 6, 6), (1, 8, 1, 1)),
    Sample("channel_1_of_4_odd", (2, 5, 7, 7), (1, 5, 1, 1), affine=True),
    Sample("conv_weight", (16, 3, 3, 3), (16, 1, 1, 1)),
    Sample("channel_last_dim", (40, 24), (1, 24)),
    Sample("channel_last_dim_odd", (40, 7), (1, 7), affine=True),
    Sample("group_of_32", (12, 96), (12, 3)),
    Sample("group_of_128", (4, 512), (4, 4), -8, 7),
    Sample("group_of_2", (4, 10), (4, 5)),
    Sample("token", (2, 9, 65), (2, 9, 1)),
    Sample("block_2d", (64, 48), (4, 3), affine=True),
    Sample("every_element", (5, 6), (5, 6)),
    Sample("three_levels", (4, 6, 4, 10), (2, 3, 2, 5)),
    Sample("bits_1", (31, 33), (1,), -1, 0),
    Sample("bits_2", (31, 33), (31, 1), -2, 1),
    Sample("bits_4", (31, 33), (31, 1), 0, 15, affine=True),
    Sample("bits_16", (31, 33), (1,), -32768, 32767),
    Sample("bits_16_unsigned", (31, 33), (1,), 0, 65535, affine=True),
    Sample("channels_last", (4, 16, 5, 5), (1, 16, 1, 1), layout="channels_last"),
    Sample("channels_last_two", (4, 16, 5, 5), (4, 16, 1, 1), layout="channels_last"),
    Sample("transposed", (24, 40), (24, 1), layout="transposed"),
    Sample("strided", (24, 40), (24, 1), layout="strided"),
    Sample("offset", (24, 40), (24, 1), layout="offset"),
    Sample("large", (130, 1031), (1,)),
    Sample("long_rows", (3, 20000), (3, 1), affine=True),
]
# One of each way through the kernels, for the checks that take long.
FEW = [
    s
    for s in SAMPLES
    if s.name in {"per_tensor_affine", "channel_1_of_4_odd", "channel_last_dim", "group_of_32", "channels_last"}
]
NOT_EMPTY = [s for s in SAMPLES if 0 not in s.shape]


def each(samples):
    return pytest.mark.parametrize("sample", samples, ids=str)


on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def assert_same(actual, expected):
    """Equal in every bit but the sign of zero and a NaN's payload; type, shape and strides too."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
