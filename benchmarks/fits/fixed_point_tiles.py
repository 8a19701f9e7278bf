"""Fits the constants of csrc/cuda/fixed_point_conv/mma.cu's estimate, by which it chooses a tile, to a sweep over ResNet-50's layers.

    python benchmarks/fits/fixed_point_tiles.py benchmarks/results/fixed-point-resnet50-<gpu>-<date>.json

The file is resnet50_layers.py's with --sweep. A random descent lowers the error of the logarithm of the times together with the time of the
tiles that the estimate chooses. Prints the constants, the sum over ResNet-50 of the chosen tiles' times and that of each layer's best.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

# name -> pixels, channels, depth, stages, blocks, channels of a thread's vector; as the candidates in fixed_point_conv_{mma,wgmma}.cu
TILES = {
    "128x256x64": (128, 256, 64, 4, 1, 16), "128x128x128": (128, 128, 128, 3, 2, 8), "128x128x64": (128, 128, 64, 4, 2, 8),
    "128x64x128": (128, 64, 128, 3, 3, 8), "128x64x64": (128, 64, 64, 4, 4, 8), "64x64x128": (64, 64, 128, 3, 4, 8),
    "64x64x64": (64, 64, 64, 4, 5, 8), "wgmma_128x128x128": (128, 128, 128, 3, 2, 16), "wgmma_128x128x64": (128, 128, 64, 5, 2, 16),
    "wgmma_128x64x128": (128, 64, 128, 3, 3, 16), "wgmma_128x64x64": (128, 64, 64, 4, 3, 16),
    "wgmma_64x128x128": (64, 128, 128, 3, 3, 16), "wgmma_64x64x128": (64, 64, 128, 4, 3, 16),
}  # fmt: skip
MULTIPROCESSORS, SHARED, RESERVED, CYCLES_A_US = 132, 233472, 1024, 1755.0
FIRST = {"copied_bytes": 60.0, "written_codes": 12.0, "step_latency": 300.0, "tile_latency": 500.0, "launch_us": 4.0}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def schedule(tile: str, row: dict, batch: int) -> dict:
    """As schedule() and fit() there."""
    m, n, depth, stages, blocks, vector = TILES[tile]
    size = (row["size"] + 2 * (row["kernel"] // 2) - row["kernel"]) // row["stride"] + 1
    steps = ceil_div(row["c"] * row["kernel"] ** 2, depth)
    row_tiles, column_tiles = ceil_div(batch * size * size, m), ceil_div(row["o"], n)
    rules = 16 * (n + n // vector * 4)
    resident = (steps * n * depth + stages * m * depth + rules + RESERVED) * blocks <= SHARED
    stage = (m if resident else m + n) * depth
    shared = stages * stage + (steps * n * depth if resident else 0) + rules
    blocks = min(SHARED // (shared + RESERVED), blocks)
    tiles = ceil_div(row_tiles, max(1, min(MULTIPROCESSORS * blocks // column_tiles, row_tiles)))
    grid = ceil_div(row_tiles, tiles) * column_tiles
    return {
        "area": m * n,
        "steps": steps,
        "depth": depth,
        "stage": stage,
        "blocks": blocks,
        "tiles": tiles,
        "grid": grid,
    }


def estimate(tile: str, s: dict, fitted: dict) -> float:
    products = s["area"] * s["steps"] * s["depth"] / (4096 * fitted[tile])
    copies = s["stage"] * s["steps"] / fitted["copied_bytes"]
    blocks, rounds = ceil_div(s["grid"], MULTIPROCESSORS), ceil_div(s["grid"], MULTIPROCESSORS * s["blocks"])
    latency = fitted["step_latency"] * s["steps"] + fitted["tile_latency"]
    return s["tiles"] * (blocks * (max(products, copies) + s["area"] / fitted["written_codes"]) + rounds * latency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    rows = [row for row in json.loads(options.sweep.read_text())["layers"] if row["c"] % 16 == 0]
    table = [
        (row["count"], {t: (us, schedule(t, row, options.batch)) for t, us in row["kernels_us"].items() if t in TILES})
        for row in rows
    ]

    def chosen(fitted: dict) -> float:
        return sum(n * us[min(us, key=lambda t: estimate(t, us[t][1], fitted))][0] for n, us in table)

    best = sum(n * min(us for us, _ in tiles.values()) for n, tiles in table)

    def loss(fitted: dict) -> float:
        error = weight = soft = 0.0
        for n, tiles in table:
            found = {t: estimate(t, s, fitted) for t, (_, s) in tiles.items()}
            least, fastest = min(found.values()), min(us for us, _ in tiles.values())
            for t, (us, _) in tiles.items():
                w = 3.0 if us < 1.15 * fastest else 1.0
                error += w * math.log((found[t] / CYCLES_A_US + fitted["launch_us"]) / us) ** 2
                weight += w
            near = {t: math.exp(-60 * (value / least - 1)) for t, value in found.items()}
            soft += n * sum(near[t] * tiles[t][0] for t in tiles) / sum(near.values())
        return math.sqrt(error / weight) + 3 * (soft / best - 1)

    generator = random.Random(0)
    fitted = {**FIRST, **dict.fromkeys(TILES, 0.5)}
    least = loss(fitted)
    for _ in range(options.steps):
        trial = dict(fitted)
        for name in generator.sample(list(trial), generator.choice((1, 1, 2))):
            trial[name] *= math.exp(generator.gauss(0, 0.12))
        if (value := loss(trial)) < least:
            fitted, least = trial, value
    for name, value in fitted.items():
        print(f"{name:<20} {value:8.2f}")
    print(f"sum over the layers: chosen {chosen(fitted):.0f} us, best of each layer {best:.0f} us")


if __name__ == "__main__":
    main()
