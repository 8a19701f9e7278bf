"""The integer network on CPU threads against float32 and int8 of its peers, all in one run.

    python benchmarks/bench_fixed_point_network.py [--networks resnet20,resnet18] [--rounds 15] [--threads 2] [--output PREFIX]

ResNet-20 at 32 x 32 (batches 64 and 1) and ResNet-18 at 224 x 224 (batches 16 and 1), random weights:
    torch float32           channels-last, batch norm folded into the convolutions
    onnxruntime float32     the same model by torch.onnx.export
    onnxruntime int8        that, quantized statically: QDQ, uint8 activations, int8 weights, per tensor, calibrated on random images
    quantrain integers      that model prepared with f8net and converted: 8-bit codes in, int32 accumulators out
    quantrain's ONNX        the same integer network, exported by export_onnx, in onnxruntime
The integers of every node are first held against those of the simulation, and onnxruntime's against them, at batch 1. Candidates take turns: in each round each one is called once unmeasured, then measured for at least 50 ms. Best and median of the rounds.
--output writes PREFIX.json and PREFIX.txt.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common.models import resnet18
from common.report import Report
from common.timing import host_seconds, turns
from torch import nn

from quantrain import nn as qnn
from quantrain.finetune.models import resnet20

NETWORKS = {"resnet20": (32, (64, 1)), "resnet18": (224, (16, 1))}
OURS = "quantrain integers"
Run = Callable[[], object]


# ---- the networks ----


def trained_like(name: str) -> nn.Module:
    """For evaluation: random weights, and the batch norms' statistics of random images, so that values keep their size."""
    torch.manual_seed(0)
    model = resnet20(10, 3) if name == "resnet20" else resnet18(1000, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of what it has seen, whole
    with torch.no_grad():
        model.train()(random_images(name, 8))
    return model.eval()


def random_images(name: str, batch: int) -> torch.Tensor:
    size = NETWORKS[name][0]
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def float_model(name: str) -> nn.Module:
    """With its batch norms folded."""
    from torch.fx.experimental.optimization import fuse

    return fuse(trained_like(name))


def integer_model(name: str) -> nn.Module:
    """The same network in integers.

    Raises:
        AssertionError: an integer is not the one that the simulation stands for.
    """
    prepared = qnn.prepare(trained_like(name), "f8net")
    qnn.calibrate(prepared, [random_images(name, 8)])
    converted = qnn.convert(copy.deepcopy(prepared).eval())
    images = random_images(name, 1)
    codes = converted.network.quantize_input(images)
    integers = {"input": codes, **converted.network.forward_all(codes)}
    for node, expected in qnn.simulated_codes(prepared, images).items():
        if not torch.equal(integers[node].to(torch.int64), expected):
            raise AssertionError(f"{name}: {node}: the integers are not the simulation's")
    return converted


# ---- candidates: each gives a call without arguments ----


def torch_float(model: nn.Module, images: torch.Tensor) -> Run:
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            return model(images)

    return run


def onnx_session(path: Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_run(path: Path, images: np.ndarray, threads: int) -> Run:
    session = onnx_session(path, threads)
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def export_float(model: nn.Module, size: int, path: Path) -> None:
    """As torch.onnx.export writes it, with an open batch."""
    torch.onnx.export(
        model.to(memory_format=torch.contiguous_format), (torch.randn(2, 3, size, size),), str(path), dynamo=False,
        input_names=["input"], output_names=["output"], dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
    )  # fmt: skip


def quantize_statically(source: Path, target: Path, size: int) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            generator = np.random.default_rng(1)
            self.batches = iter([generator.random((4, 3, size, size), dtype=np.float32) for _ in range(4)])

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(target), Images(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=False,
    )  # fmt: skip


def candidates(name: str, batch: int, folder: Path, threads: int) -> dict[str, Run]:
    source, quantized, integer = (folder / f"{name}.{kind}.onnx" for kind in ("float", "int8", "integer"))
    converted = integer_model(name)
    network = converted.network
    if not source.exists():
        export_float(float_model(name), NETWORKS[name][0], source)
        quantize_statically(source, quantized, NETWORKS[name][0])
        qnn.export_onnx(converted, integer)
        one = network.quantize_input(random_images(name, 1))
        if not np.array_equal(onnx_run(integer, one.numpy(), threads)()[0], network.forward(one).numpy()):
            raise AssertionError(f"{name}: the exported network gives other integers")
    images = random_images(name, batch)
    codes = network.quantize_input(images).contiguous()
    channels_last = codes.contiguous(memory_format=torch.channels_last)
    return {
        OURS: lambda: network.forward(channels_last),
        "torch float32": torch_float(float_model(name), images),
        "onnxruntime float32": onnx_run(source, images.numpy(), threads),
        "onnxruntime int8": onnx_run(quantized, images.numpy(), threads),
        "quantrain's ONNX": onnx_run(integer, codes.numpy(), threads),
    }


# ---- time ----


def measure(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call, a list for each candidate; in each round so many calls as take ``seconds``."""

    def timer(run: Run):
        calls = max(1, math.ceil(seconds / host_seconds(lambda _: run(), 2)))

        def timed(turn: int) -> float:
            time.sleep(0.01)  # a short rest lets the threads of the one before stop spinning
            run()
            return 1e3 * host_seconds(lambda _: run(), calls)

        return timed

    return dict(zip(runs, turns([timer(run) for run in runs.values()], rounds), strict=True))


def rows_of(name: str, batch: int, times: dict[str, list[float]]) -> list[dict]:
    rows = [
        {"network": name, "batch": batch, "candidate": candidate, "best_ms": min(t), "median_ms": statistics.median(t)}
        for candidate, t in times.items()
    ]
    ours = next(row for row in rows if row["candidate"] == OURS)
    for row in rows:
        row["times_ours"] = row["best_ms"] / ours["best_ms"]
    return rows


def line(row: dict) -> str:
    case = f"{row['network']} batch {row['batch']}"
    return f"{case:<20}{row['candidate']:<22}{row['best_ms']:10.3f} ms best{row['median_ms']:10.3f} ms median{row['times_ours']:8.2f} x ours"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="on cuda nothing is measured")
    add("--networks", type=lambda text: text.split(","), default=list(NETWORKS), help="separated by commas")
    add("--rounds", type=int, default=15)
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=0.05, help="the least time that a candidate is measured in a round")
    add("--note", default="", help="a line for the results, of what else the machine did")
    add("--output", type=Path, help="without extension: the results as .json and .txt")
    options = parser.parse_args(arguments)
    for name in options.networks:
        if name not in NETWORKS:
            parser.error(f"expected networks of {', '.join(NETWORKS)}, got {name}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda":
        print("bench_fixed_point_network: measured on a CPU only")
        return 0
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        print("expected the packages onnx and onnxruntime (extra [onnx])", file=sys.stderr)
        return 1
    import onnxruntime

    torch.set_num_threads(options.threads)
    facts = {"onnxruntime": onnxruntime.__version__, **({"note": options.note} if options.note else {})}
    path, text = (options.output.with_suffix(end) if options.output else None for end in (".json", ".txt"))
    report = Report("bench_fixed_point_network", "cpu", path, text=text, **facts)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            for batch in NETWORKS[name][1]:
                runs = candidates(name, batch, Path(folder), options.threads)
                for row in rows_of(name, batch, measure(runs, options.rounds, options.seconds)):
                    report.add(row, line(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
