"""Times every Hopper kernel of int8_mm on shapes of transformers, and fits the model by which int8_mm picks one (csrc/cuda/int8_mm/int8_mm.cu).

python benchmarks/fits/int8_mm_sweep.py measure --csv FILE     on an H200 or H100, a minute
python benchmarks/fits/int8_mm_sweep.py fit --csv FILE         coefficients, and how far the picked kernel is from the best
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.operands import random_codes
from common.report import ROOT
from common.timing import kernel_seconds

import quantrain

# name: tile of the output (rows, columns), rows of a cluster
KERNELS = {
    "pingpong_128x128_2x1": (128, 128, 2),
    "pingpong_64x128_2x1": (64, 128, 2),
    "cooperative_128x192_2x1": (128, 192, 2),
    "cooperative_128x256_1x1": (128, 256, 1),
}
STREAM_K = "stream_k_128x128_2x1"
PROCESSORS = 132
COLUMNS = ("m", "n", "k", "kernel", "swizzle", "splits", "us", "bf16_us")

LINEARS = (
    *((16384, 768, 768), (16384, 768, 3072), (16384, 2048, 8192), (16384, 1024, 4096), (8192, 4096, 4096)),
    *(
        (16384, 4096, 14336),
        (8192, 768, 2304),
        (8192, 768, 768),
        (8192, 768, 3072),
        (8192, 2048, 6144),
        (8192, 2048, 2048),
    ),
    *((8192, 2048, 8192), (8192, 4096, 12288), (8192, 4096, 16384), (4096, 1024, 4096), (2048, 1024, 3072)),
)
OTHERS = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (1024, 1024, 1024),
    (128, 4096, 1024),
    (512, 4096, 4096),
    (16, 4096, 4096),
)


def shapes() -> list[tuple[int, int, int]]:
    """(m, n, k) of the three products of each linear layer (tokens, in, out), and others."""
    found = list(OTHERS)
    for tokens, narrow, wide in LINEARS:
        for inner, outer in ((narrow, wide), (wide, narrow)):
            found += [(tokens, outer, inner), (outer, inner, tokens)]
    return list(dict.fromkeys(found))


def measure(path: Path) -> None:
    """One line per shape, kernel and setting; stream-K where tiles are few."""
    with path.open("w", newline="") as file:
        file.write(f"# {torch.cuda.get_device_name()}; quantrain {quantrain.__version__}, torch {torch.__version__}\n")
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for m, n, k in shapes():
            a, b = random_codes(m, k, "cuda"), random_codes(n, k, "cuda")
            x, w = (torch.randn(size, k, device="cuda", dtype=torch.bfloat16) for size in (m, n))
            a_scale, b_scale = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
            settings = [(name, swizzle, 0) for name in KERNELS for swizzle in (1, 2, 4, 8)]
            tiles = math.ceil(m / 128) * math.ceil(n / 128)
            if tiles <= 2 * PROCESSORS:
                settings += [(STREAM_K, 1, splits) for splits in (0, PROCESSORS // tiles) if splits != 1]

            def run(kernel: str, swizzle: int, splits: int, a=a, b=b, a_scale=a_scale, b_scale=b_scale) -> None:
                torch.ops.quantrain._int8_mm_by_kernel(
                    a,
                    b,
                    a_scale,
                    b_scale,
                    None,
                    out_dtype=torch.bfloat16,
                    kernel=kernel,
                    swizzle=swizzle,
                    splits=splits,
                )

            runs = [lambda _, s=setting: run(*s) for setting in settings] + [lambda _, x=x, w=w: x @ w.T]
            *times, half = kernel_seconds(runs, "cuda", repeats=7, batch_seconds=5e-4)
            for setting, seconds in zip(settings, times, strict=True):
                rows.writerow((m, n, k, *setting, f"{1e6 * seconds:.2f}", f"{1e6 * half:.2f}"))
            file.flush()


def features(m: int, n: int, k: int, kernel: str) -> list[float]:
    tile_rows, tile_columns, cluster = KERNELS[kernel]
    tiles = math.ceil(math.ceil(m / tile_rows) / cluster) * cluster * math.ceil(n / tile_columns)
    waves = math.ceil(tiles / PROCESSORS)
    return [waves * k / 1000, waves, 1.0]


def fit(path: Path) -> None:
    """Least squares of relative errors, for each kernel over its best swizzle."""
    times: dict[tuple[int, int, int], dict[str, float]] = {}
    with path.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            shape, kernel = (int(row["m"]), int(row["n"]), int(row["k"])), row["kernel"]
            best = times.setdefault(shape, {})
            best[kernel] = min(best.get(kernel, math.inf), float(row["us"]))
    found = {}
    for kernel in KERNELS:
        known = [(features(*shape, kernel), best[kernel]) for shape, best in times.items()]
        left = torch.tensor([[x / time for x in row] for row, time in known], dtype=torch.float64)
        found[kernel] = torch.linalg.lstsq(left, torch.ones(len(known), 1, dtype=torch.float64)).solution.flatten()
        error = (left @ found[kernel] - 1).abs()
        values = ", ".join(f"{value:.2f}" for value in found[kernel].tolist())
        print(f"{kernel:<26} by depth, by wave, fixed: {values}   relative error: mean {error.mean():.3f}")
    excess = []
    for shape, best in times.items():
        model = {
            kernel: sum(c * x for c, x in zip(found[kernel].tolist(), features(*shape, kernel), strict=True))
            for kernel in KERNELS
        }
        picked = min(model, key=model.__getitem__)
        excess.append(best[picked] / min(best[kernel] for kernel in KERNELS))
    print(
        f"picked over best of the four, {len(excess)} shapes: mean {statistics.mean(excess):.4f}, worst {max(excess):.3f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "benchmarks" / "results" / "int8-mm-sweep-h200-2026-11-23.csv"
    )
    options = parser.parse_args(arguments)
    (measure if options.what == "measure" else fit)(options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
