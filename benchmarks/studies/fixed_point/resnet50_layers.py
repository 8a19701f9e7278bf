"""ResNet-50's convolutions in 8-bit fixed point over torch's float16 ones, channels-last, on one GPU.

    python benchmarks/studies/fixed_point/resnet50_layers.py [--batch 64] [--sweep] [--checks-only] [--output FILE]

First every shape is checked, and shapes that are odd: results against float64 sums on the CPU's integers or the GPU without cuDNN, new memory
poisoned. Then quantrain's fixed_point_conv2d_requantize (bias, shift, clamp: codes to codes) and torch's conv2d (float16 to float16, no bias,
cudnn.benchmark) are timed in CUDA graphs of calls whose operands and results rotate through more than the cache holds; candidates take turns;
medians. `residual`: the same layer with the shortcut's codes added. `bound`: what the layer's bytes take at the rate of a copy in this run.
The last line: times weighted by how often ResNet-50 has the layer. --sweep times every kernel of QUANTRAIN_CUDA_FIXED_POINT_CONV.
--output FILE writes FILE (text) and FILE with the suffix .json.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.operands import codes
from common.report import write_json
from common.timing import CACHE_BYTES, Captured, copy_rate, graph_seconds

import quantrain  # noqa: F401  loads the operators

ops = torch.ops.quantrain
VARIABLE = "QUANTRAIN_CUDA_FIXED_POINT_CONV"
WGMMA = (
    "wgmma_128x128x128",
    "wgmma_128x128x64",
    "wgmma_128x64x128",
    "wgmma_128x64x64",
    "wgmma_64x128x128",
    "wgmma_64x64x128",
)
MMA = ("128x256x64", "128x128x128", "128x128x64", "128x64x128", "128x64x64", "64x64x128", "64x64x64")
KERNELS = (*WGMMA, *MMA, "patch", "gather")


@dataclass(frozen=True)
class Layer:
    count: int  # in ResNet-50
    c: int
    o: int
    size: int  # of the input, square
    kernel: int = 1
    stride: int = 1
    expands: bool = False  # the shortcut is added to its result

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def name(self) -> str:
        return f"{self.c:>4} -> {self.o:<4} {self.kernel}x{self.kernel}/{self.stride} at {self.size}"

    def macs(self, batch: int) -> int:
        return batch * self.out_size**2 * self.o * self.c * self.kernel**2


LAYERS = [
    Layer(1, 3, 64, 224, 7, 2),
    Layer(1, 64, 64, 56), Layer(3, 64, 64, 56, 3), Layer(4, 64, 256, 56, expands=True), Layer(2, 256, 64, 56),
    Layer(1, 256, 128, 56), Layer(1, 128, 128, 56, 3, 2), Layer(4, 128, 512, 28, expands=True),
    Layer(1, 256, 512, 56, 1, 2), Layer(3, 512, 128, 28), Layer(3, 128, 128, 28, 3),
    Layer(1, 512, 256, 28), Layer(1, 256, 256, 28, 3, 2), Layer(6, 256, 1024, 14, expands=True),
    Layer(1, 512, 1024, 28, 1, 2), Layer(5, 1024, 256, 14), Layer(5, 256, 256, 14, 3),
    Layer(1, 1024, 512, 14), Layer(1, 512, 512, 14, 3, 2), Layer(3, 512, 2048, 7, expands=True),
    Layer(1, 1024, 2048, 14, 1, 2), Layer(2, 2048, 512, 7), Layer(2, 512, 512, 7, 3),
]  # fmt: skip


# ---- operands and checks ----------------------------------------------------------------------------------------------------


def shifts(c: int, kernel: int, o: int, channels: bool) -> torch.Tensor:
    """What brings sums of random codes into the range of codes, a step up or down by channel."""
    spread = 128 * 73 * (c * kernel * kernel) ** 0.5
    middle = max(1, round(torch.tensor(spread / 64).log2().item()))
    return torch.randint(middle - 1, middle + 2, (o if channels else 1,), dtype=torch.int32, device="cuda")


def requantized(sums: torch.Tensor, shift: torch.Tensor, signed: bool) -> torch.Tensor:
    """Of float64 sums, which are exact here: torch.round is half to even."""
    low, high = (-127, 127) if signed else (0, 255)
    scaled = torch.round(sums * torch.exp2(-shift.double()).view(1, -1, 1, 1))
    return scaled.clamp(low, high)


def expected(x, weight, bias, shift, residual, residual_shift, signed, **where) -> torch.Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        sums = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **where)
    if shift is None:
        return sums
    if residual is not None:
        d = residual_shift.double().view(1, -1, 1, 1)
        sums = sums * torch.exp2((-d).clamp(min=0)) + residual.double() * torch.exp2(d.clamp(min=0))
        shift = shift + (-residual_shift).clamp(min=0)
    return requantized(sums, shift, signed)


def poison(numel: int, value: int) -> None:
    """Leaves memory of this size, which the allocator gives to the next tensor of the size, full of a value."""
    torch.full((max(numel, 1),), value, dtype=torch.uint8, device="cuda")


def check(n, c, h, w, o, kernel, stride=(1, 1), padding=(0, 0), groups=1, *, signed_input=False, signed=False, channels=True, residual=None, images=None):  # fmt: skip
    """One convolution, to codes and to sums; images: of which the reference is computed, where not all."""
    kh, kw = kernel
    x = codes((n, c, h, w), torch.int8 if signed_input else torch.uint8)
    weight = codes((o, c // groups, kh, kw), torch.int8)
    bias = torch.randint(-(2**12), 2**12, (o,), dtype=torch.int32, device="cuda")
    shift = shifts(c // groups, max(kh, kw), o, channels)
    oh, ow = (h + 2 * padding[0] - kh) // stride[0] + 1, (w + 2 * padding[1] - kw) // stride[1] + 1
    where = {"stride": list(stride), "padding": list(padding), "groups": groups}
    shortcut = residual_shift = None
    if residual is not None:
        shortcut = codes((n, o, oh, ow), residual)
        low, high = (-2, 3) if residual == torch.int32 else (-1, 8)
        residual_shift = torch.randint(low, high, (o if channels else 1,), dtype=torch.int32, device="cuda")
    some = slice(None) if images is None else torch.tensor(images, device="cuda")
    part = None if shortcut is None else shortcut[some]
    for value in (0xAA, 0x55):
        poison(n * o * oh * ow, value)
        found = ops.fixed_point_conv2d_requantize(x, weight, bias, shift, shortcut, residual_shift, signed=signed, **where)  # fmt: skip
        reference = expected(x[some], weight, bias, shift, part, residual_shift, signed, **where)
        assert found.shape == (n, o, oh, ow) and found.dtype == (torch.int8 if signed else torch.uint8)
        assert torch.equal(found[some].double(), reference), (n, c, h, w, o, kernel, stride, padding, groups, residual)
    if residual is None:
        poison(4 * n * o * oh * ow, 0xAA)
        found = ops.fixed_point_conv2d(x, weight, bias, **where)
        reference = expected(x[some], weight, bias, None, None, None, signed, **where)
        assert torch.equal(found[some].double(), reference), (n, c, h, w, o, kernel, stride, padding, groups)
    share = ((reference > (-127 if signed else 0)) & (reference < (127 if signed else 255))).double().mean().item()
    assert residual is None or share > 0.01, "the check's codes are all at the ends"


ODD = [
    # n, c, h, w, o, kernel, stride, padding, groups
    (2, 3, 33, 31, 64, (7, 7), (2, 2), (3, 3), 1), (3, 3, 32, 32, 16, (3, 3), (1, 1), (1, 1), 1),
    (5, 1, 28, 28, 20, (5, 5), (1, 1), (0, 0), 1), (2, 1, 29, 27, 16, (3, 3), (2, 2), (1, 1), 1),
    (3, 20, 13, 11, 40, (3, 3), (1, 1), (1, 1), 1), (2, 20, 9, 9, 50, (5, 5), (1, 1), (2, 2), 1),
    (2, 100, 9, 7, 33, (3, 3), (1, 1), (1, 1), 1), (2, 16, 15, 17, 16, (3, 3), (1, 1), (1, 1), 1),
    (3, 16, 32, 32, 32, (3, 3), (2, 2), (1, 1), 1), (2, 48, 14, 14, 80, (3, 3), (1, 1), (1, 1), 1),
    (4, 64, 8, 8, 10, (1, 1), (1, 1), (0, 0), 1), (130, 512, 1, 1, 1000, (1, 1), (1, 1), (0, 0), 1),
    (2, 80, 12, 10, 144, (1, 3), (2, 1), (0, 2), 1), (2, 272, 7, 7, 272, (2, 3), (1, 2), (1, 0), 1),
    (3, 32, 14, 14, 32, (3, 3), (1, 1), (1, 1), 32), (2, 64, 15, 13, 64, (3, 3), (2, 2), (1, 1), 64),
    (2, 144, 9, 9, 144, (5, 5), (1, 1), (2, 2), 144), (2, 960, 7, 7, 960, (3, 3), (1, 1), (1, 1), 960),
    (2, 7, 9, 9, 7, (3, 3), (1, 1), (1, 1), 7), (2, 32, 9, 9, 64, (3, 3), (1, 1), (1, 1), 4),
    (2, 6, 9, 9, 12, (3, 3), (1, 1), (1, 1), 6), (1, 2048, 3, 3, 64, (3, 3), (1, 1), (1, 1), 1),
]  # fmt: skip


def checks(batch: int) -> int:
    torch.manual_seed(0)
    done = 0
    for shape in ODD:
        for residual in (None, torch.uint8, torch.int8, torch.int32):
            for signed_input, signed, channels in ((False, False, True), (True, True, True), (True, False, False), (False, True, True)):  # fmt: skip
                check(*shape, signed_input=signed_input, signed=signed, channels=channels, residual=residual)
                done += 1
    images = sorted({0, batch // 2, batch - 1})
    for layer in LAYERS:
        for residual in (None, torch.uint8, torch.int32):
            square = [(value, value) for value in (layer.kernel, layer.stride, layer.padding)]
            check(batch, layer.c, layer.size, layer.size, layer.o, *square, residual=residual, images=images)
            done += 1
    for dtype in (torch.uint8, torch.int8):
        for n, c, h, w in ((2, 64, 56, 56), (3, 20, 9, 7), (2, 3, 8, 8)):
            x = codes((n, c, h, w), dtype)
            for kernel, stride, padding in (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((2, 3), (1, 2), (1, 1))):  # fmt: skip
                found = ops.fixed_point_max_pool2d(x, kernel, stride, padding)
                assert torch.equal(found.double(), F.max_pool2d(x.double(), kernel, stride, padding))
            total = ops.fixed_point_sum_pool2d(x)
            assert torch.equal(total.long(), x.long().sum((2, 3), keepdim=True))
            done += 1
    return done


# ---- timing ----------------------------------------------------------------------------------------------------------------


def measure(layer: Layer, batch: int, rate: float, sweep: bool) -> dict:
    size, out = layer.size, layer.out_size
    int8_bytes = batch * (size**2 * layer.c + out**2 * layer.o) + layer.o * layer.c * layer.kernel**2
    # An input row that no stride reaches is not read.
    touched = int8_bytes - (0 if layer.kernel >= layer.stride else batch * layer.c * (size**2 - out**2))
    sets = max(8, min(32, -(-CACHE_BYTES // int8_bytes)))
    where = {"stride": [layer.stride] * 2, "padding": [layer.padding] * 2}
    x = [codes((batch, layer.c, size, size), torch.uint8) for _ in range(sets)]
    weight = [
        codes((layer.o, layer.c, layer.kernel, layer.kernel), torch.int8).contiguous(memory_format=torch.channels_last)
        for _ in range(sets)
    ]
    bias = torch.zeros(layer.o, dtype=torch.int32, device="cuda")
    shift = shifts(layer.c, layer.kernel, layer.o, True)

    def fixed(index: int) -> torch.Tensor:
        return ops.fixed_point_conv2d_requantize(x[index], weight[index], bias, shift, **where)

    graphs = {"int8": Captured(fixed, sets)}
    if layer.expands:
        shortcut = [codes((batch, layer.o, out, out), torch.uint8) for _ in range(sets)]
        d = torch.full((1,), 4, dtype=torch.int32, device="cuda")
        graphs["residual"] = Captured(
            lambda i: ops.fixed_point_conv2d_requantize(x[i], weight[i], bias, shift, shortcut[i], d, **where), sets
        )
    x16, weight16 = ([t.half() / 64 for t in tensors] for tensors in (x, weight))
    graphs["fp16"] = Captured(lambda i: F.conv2d(x16[i], weight16[i], **where), sets)
    found = graph_seconds(graphs)
    row = {
        **asdict(layer), "name": layer.name, "int8_us": found["int8"] * 1e6, "fp16_us": found["fp16"] * 1e6,
        "residual_us": found["residual"] * 1e6 if layer.expands else None, "ratio": found["fp16"] / found["int8"],
        "tops": 2 * layer.macs(batch) / found["int8"] / 1e12, "bytes_per_second": touched / found["int8"],
        "bound_us": touched / rate * 1e6,
    }  # fmt: skip
    if sweep:
        row["kernels_us"] = {}
        del graphs, x16, weight16
        for kernel in KERNELS:
            os.environ[VARIABLE] = kernel
            try:
                row["kernels_us"][kernel] = graph_seconds({"it": Captured(fixed, sets)}, 7)["it"] * 1e6
            except RuntimeError:  # it does not serve the shape
                torch.cuda.synchronize()
            finally:
                del os.environ[VARIABLE]
    torch.cuda.empty_cache()
    return row


def line_of(row: dict) -> str:
    residual = f"{row['residual_us']:8.1f}" if row["residual_us"] else " " * 8
    text = (
        f"{row['count']:>2} x {row['name']:<28} {row['int8_us']:8.1f} {row['fp16_us']:8.1f} {row['ratio']:6.2f} {residual} "
        f"{row['bound_us']:8.1f} {row['tops']:6.0f} {row['bytes_per_second'] / 1e12:6.2f}"
    )
    if row.get("kernels_us"):
        best = sorted(row["kernels_us"].items(), key=lambda item: item[1])
        text += "   " + ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in best)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sweep", action="store_true", help="also time each kernel by name")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--output", type=Path, help="text file; the same with .json beside it")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    say(
        f"# ResNet-50's convolutions, batch {options.batch}: fixed point (uint8 x int8 -> uint8) over torch's float16, channels-last"
    )
    say(f"# gpu {torch.cuda.get_device_name()}; date {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}; torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")  # fmt: skip
    say(f"# command python {' '.join(sys.argv)}")
    if not options.no_checks:
        say(f"# {checks(options.batch)} checks passed: exact against float64, memory poisoned")
    if options.checks_only:
        return 0
    rate = copy_rate("cuda")
    say(f"# copy of 1 GiB: {rate / 1e12:.2f} TB/s read and written; times in microseconds; rate: TB/s")
    say(f"{'layer':<33} {'int8':>8} {'fp16':>8} {'ratio':>6} {'residual':>8} {'bound':>8} {'TOP/s':>6} {'rate':>6}")
    rows = []
    with torch.no_grad():
        for layer in LAYERS:
            rows.append(measure(layer, options.batch, rate, options.sweep))
            say(line_of(rows[-1]))
    total = {key: sum(row["count"] * row[key] for row in rows) for key in ("int8_us", "fp16_us", "bound_us")}
    ratio = total["fp16_us"] / total["int8_us"]
    say(f"sum, by count: int8 {total['int8_us']:.0f} us, fp16 {total['fp16_us']:.0f} us, ratio {ratio:.2f} (at least 1.2 is asked); bytes alone {total['bound_us']:.0f} us")  # fmt: skip
    if options.sweep:
        best = sum(r["count"] * min([r["int8_us"], *r["kernels_us"].values()]) for r in rows)
        say(f"with the best kernel of each layer: {best:.0f} us, ratio {total['fp16_us'] / best:.2f}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("\n".join(lines) + "\n")
        report = {
            "gpu": torch.cuda.get_device_name(), "command": " ".join(sys.argv), "header": lines[:4], "layers": rows,
            "copy_bytes_per_second": rate, "sum": total, "ratio": ratio,
        }  # fmt: skip
        write_json(options.output.with_suffix(".json"), report)
    return 0 if ratio >= 1.2 else 1


if __name__ == "__main__":
    sys.exit(main())
