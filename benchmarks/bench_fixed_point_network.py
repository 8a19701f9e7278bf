"""The integer network on CPU threads against float32 and int8 of its peers, all in one run.

    python benchmarks/bench_fixed_point_network.py [--networks resnet20,resnet18] [--rounds 15] [--threads 2] [--output PREFIX]

ResNet-20 at 32 x 32 (batches 64 and 1) and ResNet-18 at 224 x 224 (batches 16 and 1), random weights:
    torch float32           channels-last, batch norm folded into the convolutions
    onnxruntime float32     the same model by torch.onnx.export
    onnxruntime int8        that, quantised statically: QDQ, uint8 activations, int8 weights, per tensor, calibrated on random images
    quantrain integers      FixedPointNetwork: uint8 codes in, int32 accumulators out
    quantrain's ONNX        the same integer network, exported by export_onnx, in onnxruntime
The integers of both are first held against the oracle, at batch 1. Candidates take turns: in each round each one is called once unmeasured, then measured for at least 50 ms. Best and median of the rounds.
--output writes PREFIX.json and PREFIX.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common.report import environment
from torch import nn

import quantrain

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "python"))
from samples.fixed_point_graphs import GraphBuilder  # noqa: E402

from quantrain.nn.fixed_point.onnx import export_onnx  # noqa: E402

NETWORKS = {"resnet20": (32, (64, 1)), "resnet18": (224, (16, 1))}
OURS, PEERS = "quantrain integers", ("torch float32", "onnxruntime float32", "onnxruntime int8")
Run = Callable[[], object]


# ---- the networks ----


def float_model(name: str) -> nn.Module:
    """For evaluation, with its batch norms folded."""
    from torch.fx.experimental.optimization import fuse

    torch.manual_seed(0)
    if name == "resnet20":
        from quantrain.finetune.models import resnet20

        model = resnet20(10, 3)
    else:
        from torchvision.models import resnet18

        model = resnet18()
    return fuse(model.eval())


def integer_graph(name: str, batch: int) -> tuple[GraphBuilder, tuple]:
    """(builder, (graph, tensors, codes)) of the same network in integers: random weights, fraction lengths by what they give."""
    size = NETWORKS[name][0]
    b = GraphBuilder(0, channels=3, size=size, batch=batch, signed=False, fraction_length=8)
    if name == "resnet20":
        x = b.conv("input", 16)
        widths, blocks, classes = (16, 32, 64), 3, 10
    else:
        x = b.max_pool(b.conv("input", 64, kernel=7, stride=2, padding=3))
        widths, blocks, classes = (64, 128, 256, 512), 2, 1000
    for stage, width in enumerate(widths):
        for block in range(blocks):
            x = residual_block(b, x, width, stride=2 if stage and not block else 1, convolution=name == "resnet18")
    return b, b.classify(x, classes)


def residual_block(b: GraphBuilder, x: str, width: int, *, stride: int, convolution: bool) -> str:
    y = b.conv(x, width, stride=stride)
    if stride == 1:
        shortcut = x
    elif convolution:
        shortcut = b.conv(x, width, kernel=1, stride=stride, output="accumulators")
    else:
        shortcut = b.slice_pad(x, stride, (width // 4, width // 4))
    return b.conv(y, width, residual=shortcut)


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


def assert_oracle(name: str, b: GraphBuilder, graph: dict, found: np.ndarray) -> None:
    if not np.array_equal(found, b.values[graph["output"]["name"]].data):
        raise AssertionError(f"{name}: the integers are not the oracle's")


def integer_network(name: str, batch: int) -> tuple[Run | None, str]:
    """(a call of FixedPointNetwork, checked against the oracle; or None, and why not)."""
    if not hasattr(quantrain._C, "FixedPointNetwork"):
        return None, "this build has no FixedPointNetwork"
    b, (graph, tensors, codes) = integer_graph(name, 1)
    network = quantrain._C.FixedPointNetwork(json.dumps(graph), {k: torch.from_numpy(v) for k, v in tensors.items()})
    assert_oracle(name, b, graph, network.forward(torch.from_numpy(codes)).numpy())
    many = torch.randint(0, 256, (batch, *codes.shape[1:]), dtype=torch.uint8)
    many = many.contiguous(memory_format=torch.channels_last)
    return lambda: network.forward(many), "equal to the oracle at batch 1"


def candidates(name: str, batch: int, folder: Path, threads: int) -> tuple[dict[str, Run], str]:
    size = NETWORKS[name][0]
    source, quantized, integer = (folder / f"{name}.{kind}.onnx" for kind in ("float", "int8", "integer"))
    if not source.exists():
        export_float(float_model(name), size, source)
        quantize_statically(source, quantized, size)
        b, (graph, tensors, codes) = integer_graph(name, 1)
        export_onnx((graph, tensors), integer)
        assert_oracle(name, b, graph, onnx_run(integer, codes, threads)()[0])
    images = torch.rand(batch, 3, size, size)
    codes = np.random.default_rng(2).integers(0, 256, images.shape).astype(np.uint8)
    runs = {
        "torch float32": torch_float(float_model(name), images),
        "onnxruntime float32": onnx_run(source, images.numpy(), threads),
        "onnxruntime int8": onnx_run(quantized, images.numpy(), threads),
        "quantrain's ONNX": onnx_run(integer, codes, threads),
    }
    ours, note = integer_network(name, batch)
    return (runs if ours is None else {OURS: ours, **runs}), note


# ---- time ----


def measure(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call, a list a candidate. A short rest lets the threads of the one before stop spinning."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.01)
            run()
            calls, started = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - started < seconds:
                run()
                calls += 1
            times[name].append(1e3 * (time.perf_counter() - started) / calls)
    return times


def rows_of(name: str, batch: int, times: dict[str, list[float]]) -> list[dict]:
    rows = [
        {"network": name, "batch": batch, "candidate": candidate, "best_ms": min(t), "median_ms": statistics.median(t)}
        for candidate, t in times.items()
    ]
    ours = next((row for row in rows if row["candidate"] == OURS), None)
    for row in rows:
        row["times_ours"] = None if ours is None else row["best_ms"] / ours["best_ms"]
    return rows


def line(row: dict) -> str:
    ratio = "" if row["times_ours"] is None else f"{row['times_ours']:8.2f} x ours"
    case = f"{row['network']} batch {row['batch']}"
    return f"{case:<20}{row['candidate']:<22}{row['best_ms']:10.3f} ms best{row['median_ms']:10.3f} ms median{ratio}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        print("expected the packages onnx and onnxruntime (extra [onnx])", file=sys.stderr)
        return 1
    import onnxruntime

    torch.set_num_threads(options.threads)
    head = {"benchmark": "bench_fixed_point_network", **environment("cpu"), "onnxruntime": onnxruntime.__version__}
    if options.note:
        head["note"] = options.note
    lines = [f"{key:<12}{value}" for key, value in head.items()]
    print("\n".join(lines), flush=True)
    rows, notes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            for batch in NETWORKS[name][1]:
                runs, notes[name] = candidates(name, batch, Path(folder), options.threads)
                rows += rows_of(name, batch, measure(runs, options.rounds, options.seconds))
                new = [line(row) for row in rows[-len(runs) :]]
                lines += new
                print("\n".join(new), flush=True)
                write(options.output, {**head, "checks": notes, "rows": rows}, lines)
    return 0


def write(prefix: Path | None, results: dict, lines: list[str]) -> None:
    if prefix is None:
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    prefix.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
