"""The one list of samples that every kind of check of the fixed_point family runs over."""

from dataclasses import dataclass

import torch
from samples.fake_quant import Sample as Layout


@dataclass
class Sample:
    name: str
    shape: tuple
    lengths_shape: tuple  # of the fraction length
    word_length: int = 8
    signed: bool = True
    layout: str = "contiguous"

    def __str__(self):
        return self.name

    @property
    def longest(self):
        return self.word_length - self.signed

    @property
    def keywords(self):
        return {"word_length": self.word_length, "signed": self.signed}

    def _lay_out(self, x):
        return Layout(self.name, self.shape, self.lengths_shape, layout=self.layout)._lay_out(x)

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        """(input, fraction length): with most fraction lengths some elements lie on or beyond the end codes, and many on halves."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=g) * 2.0 ** (self.longest / 2)
        x = torch.where(torch.rand(self.shape, generator=g) < 0.3, (x * 2).round() / 2, x)
        lengths = torch.randint(0, self.longest + 1, self.lengths_shape, generator=g, dtype=torch.int32)
        return self._lay_out(x.to(device=device, dtype=dtype)), lengths.to(device)

    def make_accumulator(self, device="cpu", seed=0):
        """(int32 accumulators, their fraction length 0..31): small, large, on halves, and the ends of int32."""
        g = torch.Generator().manual_seed(seed)
        bits = torch.randint(1, 32, self.shape, generator=g)
        acc = (torch.randn(self.shape, generator=g).double() * torch.exp2(bits - 1.0)).clamp(-(2**31), 2**31 - 1).long()
        even = torch.rand(self.shape, generator=g) < 0.5
        acc = torch.where(even, (acc >> (bits // 2)) << (bits // 2), acc)
        ends = torch.tensor([-(2**31), 2**31 - 1, 0, -1, 1])
        if acc.numel() > 5:
            acc.view(-1)[:5] = ends
        lengths = torch.randint(0, 32, self.lengths_shape, generator=g, dtype=torch.int32)
        return self._lay_out(acc.to(device=device, dtype=torch.int32)), lengths.to(device)


SAMPLES = [
    Sample("per_tensor", (37, 19), (1,)),
    Sample("per_tensor_unsigned", (64, 129), (1,), signed=False),
    Sample("zero_dim", (), ()),
    Sample("one_element", (1,), (1,)),
    Sample("empty", (0, 4), (1,)),
    Sample("conv_weight", (16, 3, 3, 3), (16, 1, 1, 1)),
    Sample("channel_0_odd", (6, 13), (6, 1), signed=False),
    Sample("channel_1_of_4", (3, 8, 6, 6), (1, 8, 1, 1)),
    Sample("channel_1_of_4_odd", (2, 5, 7, 7), (1, 5, 1, 1), signed=False),
    Sample("channel_last_dim", (40, 24), (1, 24)),
    Sample("channel_last_dim_odd", (40, 7), (1, 7), signed=False),
    Sample("group_of_32", (12, 96), (12, 3)),
    Sample("block_2d", (64, 48), (4, 3), signed=False),
    Sample("bits_2", (31, 33), (31, 1), 2),
    Sample("bits_2_unsigned", (31, 33), (31, 1), 2, signed=False),
    Sample("bits_4", (31, 33), (31, 1), 4),
    Sample("bits_5_unsigned", (31, 33), (31, 1), 5, signed=False),
    Sample("bits_12", (31, 33), (1,), 12),
    Sample("bits_16", (31, 33), (31, 1), 16),
    Sample("bits_16_unsigned", (31, 33), (31, 1), 16, signed=False),
    Sample("channels_last", (4, 16, 5, 5), (1, 16, 1, 1), layout="channels_last"),
    Sample("transposed", (24, 40), (24, 1), layout="transposed"),
    Sample("strided", (24, 40), (24, 1), layout="strided"),
    Sample("offset", (24, 40), (24, 1), signed=False, layout="offset"),
    Sample("large", (130, 1031), (1,)),
    Sample("long_rows", (3, 20000), (3, 1), signed=False),
]
# One of each way through the kernels, for the checks that take long.
FEW = [
    s
    for s in SAMPLES
    if s.name in {"per_tensor_unsigned", "channel_1_of_4_odd", "channel_last_dim", "group_of_32", "channels_last"}
]
