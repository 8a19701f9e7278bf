"""The one list of samples that every kind of check of the four_bit family runs over."""

import contextlib
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from reference import four_bit as reference
from samples.fake_quant import DTYPES, assert_same, in_each_dtype, on_each_device

__all__ = ["DTYPES", "assert_same", "in_each_dtype", "on_each_device"]

NAN, INF = float("nan"), float("inf")
SHUFFLED = reference.AF4[torch.tensor([3, 15, 0, 8, 12, 7, 1, 14, 5, 9, 2, 11, 6, 13, 10, 4])]  # a table in no order


@dataclass(frozen=True)
class Rule:
    """A format and a rule of scales, as the quantizer and the oracle take them."""

    format: str
    scale_rule: str = "absmax"
    table: str = ""

    def __str__(self):
        return "_".join(part for part in (self.format, self.table, self.scale_rule) if part)

    def values(self, device="cpu"):
        return {"sorted": reference.AF4, "shuffled": SHUFFLED}[self.table].to(device) if self.table else None

    def keywords(self, device="cpu"):
        return {"format": self.format, "table": self.values(device), "scale_rule": self.scale_rule}

    def reading(self, device="cpu"):
        """What a reader of the codes is told."""
        return {"format": self.format, "table": self.values(device)}


FORMATS = [Rule("nf4"), Rule("fp4"), Rule("e2m1"), Rule("int4"), Rule("table", table="shuffled")]
RULES = [*FORMATS, Rule("table", table="sorted"), Rule("int4", "signed")]
SEARCHES = [Rule(r.format, "search", r.table) for r in FORMATS]


@dataclass
class Sample:
    """A tensor to be quantized."""

    name: str
    shape: tuple
    kind: str = "normal"
    layout: str = "contiguous"
    block_size: int = 64
    seed: int = 0

    def __str__(self):
        return self.name

    def make(self, device="cpu", dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(100 * seed + self.seed)
        x = torch.randn(self.shape, generator=g)
        flat = x.view(-1)  # x changes with it
        n = flat.numel()
        block = torch.arange(n) // self.block_size
        if self.kind == "heavy":  # blocks over three decades
            flat *= torch.exp(2 * torch.randn(n // self.block_size + 1, generator=g)).clamp(max=30)[block]
        elif self.kind == "zeros":  # whole blocks of them, of either sign
            flat[block % 3 == 1] = 0
            flat[block % 3 == 2] *= torch.rand(n, generator=g)[block % 3 == 2] < 0.5
            flat[::7] *= -1
        elif self.kind == "zero":
            flat.zero_()
        elif self.kind == "negative_zero":
            flat.zero_().neg_()
        elif self.kind == "subnormal":  # below 2^-126: as good as 0
            flat *= 2.0**-140
        elif self.kind == "tiny":  # above it, with subnormal elements among them
            flat *= 2.0**-120 * torch.exp2(-torch.randint(0, 12, (n,), generator=g))
            flat[:: self.block_size] = 2.0**-119
        elif self.kind == "threshold":  # the largest of a block from 1/2 to 64 times 2^-126
            flat.clamp_(-1, 1)
            flat[:: self.block_size] = 1
            flat *= 2.0**-126 * torch.exp2(block - 1.0).clamp(max=64) * (1 + 2.0**-23)
        elif self.kind == "limit":  # exactly there, an ulp below, an ulp above
            flat.clamp_(-0.5, 0.5)
            flat[:: self.block_size] = 1
            flat *= 2.0**-126 * torch.tensor([1, 1 - 2.0**-23, 1 + 2.0**-23], dtype=torch.float64)[block % 3]
        elif self.kind == "one_huge":  # an element that makes all others 0
            flat[n // 2] = -1e30 if dtype != torch.float16 else -6e4
        elif self.kind == "largest":
            flat.copy_(flat.sign() * torch.finfo(dtype).max)
            flat[::5] *= torch.rand(flat[::5].shape, generator=g)
        elif self.kind == "constant":
            flat.fill_(0.37)
        elif self.kind == "positive":
            flat.abs_().add_(0.5)
        elif self.kind == "negative":
            flat.abs_().add_(0.5).neg_()
        elif self.kind == "both_largest":  # magnitudes of a few values: the largest of a block has either sign
            flat.copy_(torch.randint(-8, 9, (n,), generator=g) / 8)
        elif self.kind == "ties":  # on the thresholds of every format, under a scale of 1; of int4 halves
            values = [reference.midpoints(v.sort().values) for v in (reference.NF4, reference.AF4)]
            values += [
                s * reference.midpoints(v[:8].sort().values) for v in (reference.FP4, reference.E2M1) for s in (1, -1)
            ]
            values += [torch.arange(-13, 14) / 14]
            values = torch.cat(values)
            flat.copy_(values[torch.randint(0, len(values), (n,), generator=g)])
            flat[:: self.block_size] = 1
        elif self.kind == "not_finite":  # in every third block
            for i, value in enumerate((NAN, INF, -INF, NAN)):
                flat[(3 * i + 1) * self.block_size + 17 * i + 3] = value
        elif self.kind != "normal":
            raise ValueError(self.kind)
        return self._lay_out(x.to(device=device, dtype=dtype))

    def _lay_out(self, x):
        return laid_out(x, self.layout)

    @property
    def finite(self):
        return self.kind != "not_finite"


def laid_out(x, layout):
    """The same tensor with other strides, or at an address that divides by nothing, amid NaN (bytes: 255)."""
    filler = NAN if x.dtype.is_floating_point else 127 if x.dtype == torch.int8 else 255
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), filler, dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        flat = torch.full((x.numel() + 66,), filler, dtype=x.dtype, device=x.device)
        flat[1 : x.numel() + 1] = x.flatten()
        return flat[1 : x.numel() + 1].view(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    assert layout == "contiguous", layout
    return x


SAMPLES = [
    Sample("one_element", (1, 1)),
    Sample("short_row", (1, 63)),
    Sample("odd_rows", (3, 65)),
    Sample("qwen_3420", (5, 3420), "heavy"),
    Sample("one_block_rows", (7, 64)),
    Sample("two_block_rows", (16, 128), "heavy"),
    Sample("four_dimensions", (2, 3, 4, 192), "heavy"),
    Sample("vector", (128,)),
    Sample("vector_200", (200,)),
    Sample("row_200", (1, 200)),
    Sample("odd_vector", (131,)),
    Sample("even_rows_not_blocks", (6, 100)),
    Sample("odd_numel", (5, 63)),
    Sample("odd_multiple_of_block", (2, 3 * 64)),
    Sample("block_32", (3, 96), "heavy", block_size=32),
    Sample("block_32_flat", (3, 95), "heavy", block_size=32),
    Sample("block_128", (4, 256), block_size=128),
    Sample("block_256", (4, 512), block_size=256),
    Sample("block_512", (3, 1024), block_size=512),
    Sample("block_1024", (2, 1024), block_size=1024),
    Sample("block_2048", (2, 4096), block_size=2048),
    Sample("block_4096", (2, 4096), block_size=4096),
    Sample("block_4096_flat", (3, 4097), block_size=4096),
    Sample("block_4096_short", (3, 65), block_size=4096),
    Sample("many_rows", (1031, 128), "heavy"),
    Sample("many_rows_flat", (1031, 130), "heavy"),
    Sample("zeros", (12, 128), "zeros"),
    Sample("zero", (7, 65), "zero"),
    Sample("negative_zero", (3, 64), "negative_zero"),
    Sample("subnormal", (9, 128), "subnormal"),
    Sample("tiny", (9, 128), "tiny"),
    Sample("threshold", (8, 128), "threshold"),
    Sample("limit", (9, 64), "limit"),
    Sample("one_huge", (5, 128), "one_huge"),
    Sample("largest", (5, 128), "largest"),
    Sample("constant", (3, 130), "constant"),
    Sample("positive", (3, 130), "positive"),
    Sample("negative", (3, 130), "negative"),
    Sample("both_largest", (9, 128), "both_largest"),
    Sample("ties", (20, 128), "ties"),
    Sample("ties_flat", (20, 127), "ties"),
    Sample("not_finite", (12, 128), "not_finite"),
    Sample("not_finite_flat", (13, 101), "not_finite"),
    Sample("transposed", (24, 128), "heavy", "transposed"),
    Sample("strided", (24, 128), "heavy", "strided"),
    Sample("strided_flat", (7, 65), "heavy", "strided"),
    Sample("expanded", (24, 64), layout="expanded"),
    Sample("offset", (24, 128), "heavy", "offset"),
    Sample("offset_flat", (7, 65), "heavy", "offset"),
]
# One of each way through the kernels, for the checks that take long.
FEW = [s for s in SAMPLES if s.name in {"odd_rows", "two_block_rows", "four_dimensions", "block_32_flat", "strided"}]
FINITE = [s for s in SAMPLES if s.finite]
# Squares of errors neither overflow nor vanish; and one of the two long ones.
SEARCHED = [
    s
    for s in SAMPLES
    if s.kind not in ("tiny", "threshold", "limit", "one_huge", "largest") and s.name != "many_rows_flat"
]
EMPTY = [
    Sample("no_rows", (0, 64)),
    Sample("no_odd_rows", (0, 65)),
    Sample("no_columns", (4, 0)),
    Sample("no_elements", (0,)),
    Sample("no_samples", (2, 0, 128)),
]
# int4 and uint4 take any even divisor of K.
DIVISORS = [
    Sample("one_block_a_row", (3, 10), block_size=10),
    Sample("blocks_of_22", (4, 66), "heavy", block_size=22),
    Sample("blocks_of_2", (5, 12), block_size=2),
    Sample("of_18", (5, 18), block_size=6),
    Sample("of_100", (5, 100), "heavy", block_size=100),
    Sample("of_96", (2, 3, 192), "heavy", block_size=96),
    Sample("of_3420", (3, 3420), "heavy", block_size=114),
]


def ambiguous(shape, block_size):
    """Whether int4's shapes would say as well that a flat row has blocks of another even size."""
    k, blocks = shape[-1], math.ceil(shape[-1] / block_size)
    return numel(shape) == k and k % block_size != 0 and blocks > 1 and k % blocks == 0 and k // blocks % 2 == 0


def each(samples):
    return pytest.mark.parametrize("sample", samples, ids=str)


def each_rule(rules):
    return pytest.mark.parametrize("rule", rules, ids=str)


# ---- comparisons ----


def assert_bits(actual, expected):
    """Equal in every bit but a NaN's payload: the sign of 0 counts."""
    assert_same(actual, expected)
    if actual.dtype.is_floating_point:
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def element_is_specified(scale, n, block_size):
    """bool [n]: the codes of a block of scale NaN may be anything."""
    return ~scale.reshape(-1).isnan()[torch.arange(n) // block_size]


def assert_packed(found, expected, n, block_size, format):
    """(codes, scale, ...) on any device against the oracle's: every byte, but for the codes of blocks of scale NaN."""
    found, expected = [t.cpu() for t in found], [t.cpu() for t in expected]
    assert_bits(found[1], expected[1])
    codes, others = found[0], expected[0]
    assert codes.dtype == torch.uint8 and codes.shape == others.shape and codes.is_contiguous()
    assert found[1].dtype == torch.float32 and found[1].is_contiguous()
    known = element_is_specified(expected[1], n, block_size)
    padded = 2 * others.numel()
    if padded > n:  # the unused nibble goes with the last block
        known = torch.cat([known, known[-1:]])
    mine, theirs = (reference.unpack(t, padded, format) for t in (codes, others))
    wrong = ((mine != theirs) & known).nonzero().flatten()
    assert len(wrong) == 0, (
        f"{len(wrong)} of {n} codes, first {wrong[:5].tolist()}: "
        f"{mine[wrong[:5]].tolist()} for {theirs[wrong[:5]].tolist()}"
    )
    for mine, theirs in zip(found[2:], expected[2:], strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        specified = ~expected[1].isnan()
        assert torch.equal(mine[specified], theirs[specified])


@contextlib.contextmanager
def poisoned():
    """New tensors hold NaN, or the largest integer of their type: an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# ---- packed weights ----


@dataclass
class Weight:
    """A weight [N, K] packed by the oracle, and what it stands for."""

    name: str
    n: int
    k: int
    rule: Rule = FORMATS[0]
    block_size: int = 64
    nested: bool = False
    affine: str = ""  # "int" or "float": the zero point
    layout: str = "contiguous"

    def __str__(self):
        return self.name

    def pack(self, device="cpu", seed=0, std=0.05):
        """(positional arguments codes and scale, keywords, float32 [N, K])."""
        g = torch.Generator().manual_seed(seed + 7 * self.n + self.k)
        w = torch.randn(self.n, self.k, generator=g) * std
        keywords, zero_point = {}, None
        if self.affine:
            codes, scale, zero_point = reference.quantize_affine(w, self.block_size)
            if self.affine == "float":
                zero_point = zero_point + torch.rand(zero_point.shape, generator=g) - 0.5
            keywords = {"format": "uint4", "zero_point": zero_point}
        else:
            codes, scale = reference.quantize(w, self.block_size, **self.rule.keywords())
            keywords = self.rule.reading()
        real = scale
        if self.nested:
            scale, keywords["scale_scale"], keywords["scale_offset"] = reference.compress_scale(scale)
            real = reference.decompress_scale(scale, keywords["scale_scale"], keywords["scale_offset"])
        decoded = reference.dequantize(
            codes,
            real,
            (self.n, self.k),
            keywords["format"],
            block_size=self.block_size,
            table=keywords.get("table"),
            zero_point=zero_point,
        )

        def move(t):
            t = t.to(device) if torch.is_tensor(t) else t
            return laid_out(t, self.layout) if torch.is_tensor(t) and t.dim() else t

        keywords = {name: move(t) for name, t in keywords.items() if t is not None}
        return (move(codes), move(scale)), keywords, decoded.to(device)

    def takes_fused(self, device, dtype, rows):
        """Whether method "fused" serves an input of so many rows."""
        if device == "cpu":
            return True
        chunks, rest = divmod(self.block_size, 64)
        blocks = rest == 0 and chunks & (chunks - 1) == 0 and self.k % self.block_size == 0
        both = self.nested and bool(self.affine)
        any_rows = torch.cuda.get_device_capability()[0] == 9
        suits = blocks and dtype != torch.float32 and self.affine != "float" and not both
        return suits and (rows <= 32 or any_rows)

    def methods(self, device, dtype, rows):
        return ["fused"] * self.takes_fused(device, dtype, rows) + ["dequantize", "auto"]


WEIGHTS = [
    Weight("nf4", 128, 256),
    Weight("nf4_nested", 128, 256, nested=True),
    Weight("nf4_many_blocks_nested", 96, 1024, nested=True),
    Weight("nf4_tall", 1000, 128),
    Weight("nf4_wide", 24, 4096),
    Weight("nf4_one_row", 1, 192),
    Weight("nf4_one_flat_row", 1, 200),
    Weight("nf4_odd_n", 37, 320),
    Weight("nf4_flat_odd_k", 33, 65),
    Weight("nf4_flat_odd_nested", 77, 131, nested=True),
    Weight("nf4_flat_even_k", 40, 100),
    Weight("nf4_flat_3420", 20, 3420),
    Weight("nf4_block_32", 48, 96, block_size=32),
    Weight("nf4_block_128", 48, 384, block_size=128),
    Weight("nf4_block_4096", 16, 4096, block_size=4096),
    Weight("nf4_block_4096_flat", 63, 200, block_size=4096),
    Weight("nf4_search", 64, 256, Rule("nf4", "search")),
    Weight("fp4", 64, 256, Rule("fp4")),
    Weight("fp4_flat_nested", 45, 67, Rule("fp4"), nested=True),
    Weight("e2m1", 64, 256, Rule("e2m1")),
    Weight("table", 64, 256, Rule("table", table="shuffled")),
    Weight("int4", 64, 256, Rule("int4")),
    Weight("int4_signed", 64, 256, Rule("int4", "signed")),
    Weight("int4_flat", 33, 65, Rule("int4")),
    Weight("int4_block_of_row", 31, 100, Rule("int4"), block_size=100),
    Weight("int4_block_128", 64, 512, Rule("int4", "signed"), block_size=128),
    Weight("uint4", 64, 256, affine="int"),
    Weight("uint4_flat", 33, 65, affine="int"),
    Weight("uint4_float_zero", 64, 256, affine="float"),
    Weight("uint4_nested", 64, 256, affine="int", nested=True),
    Weight("strided", 64, 256, layout="strided"),
    Weight("offset", 64, 256, layout="offset"),
    Weight("offset_nested", 64, 256, nested=True, layout="offset"),
    Weight("offset_flat", 33, 65, layout="offset"),
]
# One of each way through the kernels.
FEW_WEIGHTS = [
    w for w in WEIGHTS if w.name in {"nf4", "nf4_many_blocks_nested", "nf4_flat_odd_k", "int4_signed", "uint4"}
]


def each_weight(weights):
    return pytest.mark.parametrize("weight", weights, ids=str)


# ---- the examples of the golden numbers ----


def golden_input():
    """float32 [128]: (((37 i) mod 101) - 50) / 64."""
    return (((37 * torch.arange(128)) % 101) - 50) / 64


GOLDEN_BYTES = {
    "nf4": (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d"
        "18e2a04c16e29f3b05d17e29f3c05d18"
    ),
    "fp4": (
        "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5be2a63d4bf5a92d63c4be5a12d73c5be2"
        "a12d7bf5a92a63c4be5a02d63c4be2a1"
    ),
    "int4": (
        "e9a3501cd6924f0bc5713efab4602de7a35f1cd6924e0bc5613dfab4502ce7a34f1cd6924e0bc5613dfab4502ce7a34f"
        "1bd6923e0ac5612df9b4501ce7a34f0b"
    ),
}
GOLDEN_MSE = {"nf4": 0.00173398, "fp4": 0.00250572, "int4": 0.00101841}
GOLDEN_SCALE = {"nf4": 0.78125, "fp4": 0.78125, "int4": 0.78125 / 7}


def hexadecimal(codes):
    return bytes(codes.flatten().tolist()).hex()


def golden_linear():
    """(x [64], codes [2, 32], scale [2, 1]) of NF4."""
    k = torch.arange(64)
    codes, scale = reference.quantize(golden_input().view(2, 64))
    return (((13 * k) % 31) - 15) / 16, codes, scale


def golden_lora():
    """(lora_a [2, 64], lora_b [2, 2], scaling)."""
    k, r, n = torch.arange(64), torch.arange(2), torch.arange(2)
    a = (((7 * k[None] + 11 * r[:, None]) % 13) - 6) / 32
    b = (((5 * n[:, None] + 3 * r[None]) % 7) - 3) / 16
    return a, b, 8.0


def drawn(seed):
    """(shape, block_size, layout, dtype) at random."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda choices: choices[int(torch.randint(len(choices), (1,), generator=g))]
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    block_size = pick([32, 32, 64, 64, 64, 128, 256, 1024])
    shape = tuple(number(1, 8) for _ in range(number(0, 3)))
    width = pick([number(1, 400), block_size * number(1, 4), 2 * number(1, 200), block_size + 1, block_size - 1])
    layout = pick(["contiguous", "strided", "offset"])
    return (*shape, width), block_size, layout, pick(DTYPES)


def numel(shape):
    return math.prod(shape)
