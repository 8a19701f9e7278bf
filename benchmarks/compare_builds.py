"""Two builds of quantrain against each other on one GPU: that a change made no kernel slower.

    python benchmarks/compare_builds.py OLD NEW [--rounds 5]

OLD and NEW are folders that hold a package ``quantrain``. Each round runs both, one process each, so that neither has the GPU's warm
state alone. Columns: the median time of a call in each build over the rounds, and NEW over OLD. Inputs rotate past the second-level cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from common.timing import kernel_seconds

SETS = 6  # of inputs of 64 MB and more


def cases() -> dict[str, Callable[[int], object]]:
    ops = torch.ops.quantrain
    found: dict[str, Callable[[int], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        x = [torch.randn(8192, 4096, device="cuda", dtype=dtype) for _ in range(SETS)]
        leaves = [t.clone().requires_grad_() for t in x]
        grad = torch.randn_like(x[0])
        for granularity, shape in {
            "tensor": (1, 1),
            "row": (8192, 1),
            "column": (1, 4096),
            "group_32": (8192, 128),
        }.items():
            scale = torch.rand(shape, device="cuda").add_(0.01)

            def forward(i, x=x, scale=scale):
                return ops.fake_quantize(x[i], scale, quant_min=-8, quant_max=7)

            def both(i, leaves=leaves, scale=scale, grad=grad):
                return torch.autograd.grad(
                    ops.fake_quantize(leaves[i], scale, quant_min=-8, quant_max=7), leaves[i], grad
                )

            def choose(i, x=x, shape=shape):
                return ops.choose_qparams(x[i], list(shape))

            def search(i, x=x, shape=shape):
                limits = {"quant_min": -8, "quant_max": 7, "symmetric": True, "steps": 20}
                return ops._mse_range(x[i], list(shape), **limits)

            found[f"fake_quantize {granularity} {name}"] = forward
            found[f"fake_quantize + backward {granularity} {name}"] = both
            found[f"choose_qparams {granularity} {name}"] = choose
            found[f"_mse_range {granularity} {name}"] = search
        weight, bias = torch.randn(4096, device="cuda"), torch.randn(4096, device="cuda")
        found[f"int8_layer_norm {name}"] = lambda i, x=x, w=weight, b=bias: ops.int8_layer_norm(x[i], w, b)
        found[f"int8_quantize_rows {name}"] = lambda i, x=x: ops.int8_quantize_rows(x[i])
        scales = torch.rand(8192, device="cuda")
        found[f"int8_weight_transpose {name}"] = lambda i, x=x, s=scales: ops.int8_weight_transpose(x[i], s)
    codes = [torch.randint(0, 255, (64, 256, 56, 56), device="cuda", dtype=torch.uint8) for _ in range(SETS)]
    codes = [c.contiguous(memory_format=torch.channels_last) for c in codes]
    one, two = (torch.tensor([n], device="cuda", dtype=torch.int32) for n in (1, 2))
    kernel = torch.randint(-127, 127, (256, 256, 1, 1), device="cuda", dtype=torch.int8)
    shift = torch.full((256,), 8, device="cuda", dtype=torch.int32)
    found["fixed_point_add"] = lambda i: ops.fixed_point_add(codes[i], codes[i - 1], one, two)
    found["fixed_point_conv2d_requantize 1x1"] = lambda i: ops.fixed_point_conv2d_requantize(
        codes[i], kernel, None, shift
    )
    found["fixed_point_conv2d_requantize 1x1 stride 2"] = lambda i: ops.fixed_point_conv2d_requantize(
        codes[i], kernel, None, shift, stride=[2, 2]
    )
    found["fixed_point_max_pool2d"] = lambda i: ops.fixed_point_max_pool2d(codes[i], [3, 3], [2, 2], [1, 1])
    return found


def microseconds(run: Callable[[int], object]) -> float:
    (seconds,) = kernel_seconds([lambda index: run(index % SETS)], "cuda")
    return 1e6 * seconds


def run_build(folder: str) -> dict[str, float]:
    """Times of every case in a process that imports the package of this folder."""
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, __file__, "--child"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{folder}: expected the benchmark to run, got\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="*", help="OLD NEW")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        import quantrain  # noqa: F401  loads the operators of this process's build

        print(json.dumps({name: microseconds(run) for name, run in cases().items()}))
        return
    if len(arguments.builds) != 2:
        parser.error(f"expected two folders, OLD and NEW, got {len(arguments.builds)}")
    rounds = [[run_build(folder) for folder in arguments.builds] for _ in range(arguments.rounds)]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.rounds} rounds; microseconds of a call"
    )
    print(f"{'operator':<48} {'old':>9} {'new':>9} {'new / old':>10}")
    for name in rounds[0][0]:
        old, new = (statistics.median(pair[side][name] for pair in rounds) for side in (0, 1))
        print(f"{name:<48} {old:9.1f} {new:9.1f} {new / old:10.3f}")


if __name__ == "__main__":
    main()
