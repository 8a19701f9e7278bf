#!/usr/bin/env python3
"""The study of fixed-point networks: float32, `f8net` and `f8net-tiny`, trained, converted, and checked against the simulation.

Parts:
  train      trains float32, fine-tunes by both schedules, converts; accuracy of each, of the integer network by its own arithmetic,
             and the fraction lengths. Writes fixed-point-<data>-<model>.json
  equality   trains float32 and from it `f8net`, --steps each, converts, and compares every code of every node with the simulation over the whole
             test set. Prints a line per node, writes fixed-point-equality-<data>-<model>.json, fails where a code differs

Usage: python benchmarks/studies/fixed_point/study.py train|equality --data fashion-mnist|cifar10-jpeg --model resnet20|mobilenet_v2 [--device cuda] [--out FOLDER]
CIFAR-10-JPEG and ResNet-20's published weights are read from $QUANTRAIN_DATA, Fashion-MNIST where `quantrain finetune` finds it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.augmented import Images, accuracy
from common.data import cifar10_jpeg, pretrained_resnet20, random_images
from common.models import MODELS
from common.report import environment, write_json

import quantrain
from quantrain import nn as qnn
from quantrain.finetune.data import load_fashion_mnist
from quantrain.finetune.trainer import TrainSettings
from studies.fixed_point.training import train

# data, model -> epochs and learning rate of float32, and of the full fine-tuning (batches of 128, Nesterov momentum, one cycle).
SCHEDULES = {
    ("fashion-mnist", "resnet20"): ((20, 0.2), (10, 0.05)),
    ("fashion-mnist", "mobilenet_v2"): ((20, 0.2), (10, 0.05)),
    ("cifar10-jpeg", "resnet20"): ((20, 0.1), (15, 0.05)),
    ("cifar10-jpeg", "mobilenet_v2"): ((30, 0.2), (15, 0.05)),
    ("random", "resnet20"): ((2, 0.05), (1, 0.01)),
    ("random", "mobilenet_v2"): ((2, 0.05), (1, 0.01)),
}
TINY = TrainSettings(epochs=2, lr=1e-4, weight_decay=1e-4, warmup=0.1, max_steps=500)


def load(data: str, device: torch.device) -> Images:
    if data == "fashion-mnist":
        return Images.of(load_fashion_mnist(), device)
    return Images.of(cifar10_jpeg() if data == "cifar10-jpeg" else random_images(), device)


def fraction_lengths(model: torch.nn.Module) -> dict[str, dict]:
    """Layer -> fraction lengths of its input's codes and its weight's, from the graph of the integer network."""
    graph = json.loads(model.network.graph())
    made = {graph["input"]["name"]: graph["input"].get("fraction_length")}
    table = {}
    for node in graph["nodes"]:
        source = made.get(node["inputs"][0])
        if "weight_fraction_length" in node:
            table[node["name"]] = {"input": source, "weight": node["weight_fraction_length"], "op": node["op"]}
        made[node["name"]] = node.get("fraction_length", source)
    return table


def compare(prepared: torch.nn.Module, converted: torch.nn.Module, images: Images, batch_size: int = 500) -> dict:
    """Node -> how many codes were compared and how many differ between the integer network and the simulation, over the test set."""
    nodes: dict[str, dict[str, int]] = {}
    for inputs in images.test_images.split(batch_size):
        inputs = images.normalize(inputs)
        simulated = qnn.simulated_codes(prepared, inputs)
        codes = converted.network.quantize_input(inputs)
        integer = {"input": codes, **converted.network.forward_all(codes)}
        for name, expected in simulated.items():
            node = nodes.setdefault(name, {"compared": 0, "different": 0})
            node["compared"] += expected.numel()
            node["different"] += int((expected != integer[name].to(torch.int64)).sum())
    return nodes


def equality(prepared: torch.nn.Module, converted: torch.nn.Module, images: Images) -> dict:
    """The sums of `compare`."""
    nodes = compare(prepared, converted, images)
    totals = {key: sum(node[key] for node in nodes.values()) for key in ("compared", "different")}
    return {"nodes": len(nodes), **totals}


def start(arguments: argparse.Namespace) -> tuple[Images, torch.nn.Module, dict]:
    """The data, the float model with its first weights, and what a result file begins with."""
    device = torch.device(arguments.device)
    images = load(arguments.data, device)
    torch.manual_seed(arguments.seed)
    model = MODELS[arguments.model](10, images.train_images.shape[1]).to(device)
    if (arguments.data, arguments.model) == ("cifar10-jpeg", "resnet20"):
        model.load_state_dict(pretrained_resnet20())
    about = {
        "data": arguments.data,
        "model": arguments.model,
        "seed": arguments.seed,
        **environment(device.type),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return images, model, about


def prepare(model: torch.nn.Module, recipe: quantrain.Recipe, images: Images, seed: int) -> torch.nn.Module:
    """A copy, prepared and calibrated on 2048 images."""
    prepared = qnn.prepare(copy.deepcopy(model), recipe)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.train_labels), generator=generator)[:2048].to(images.train_labels.device)
    qnn.calibrate(prepared, [images.normalize(images.train_images[part]) for part in order.split(256)])
    return prepared


def run_equality(arguments: argparse.Namespace) -> int:
    """How many codes differ."""
    images, model, result = start(arguments)
    settings = TrainSettings(epochs=1, lr=0.05, batch_size=arguments.batch_size, max_steps=arguments.steps)
    result["float32"] = train(model, images, settings)
    prepared = prepare(model.eval(), quantrain.Recipe.from_name("f8net"), images, arguments.seed)
    result["f8net"] = train(prepared, images, replace(settings, lr=0.01))
    converted = qnn.convert(copy.deepcopy(prepared).eval())
    result["nodes"] = compare(prepared, converted, images)
    for name, node in result["nodes"].items():
        print(f"{name:<40} {node['compared']:>14} codes, {node['different']} differ", flush=True)
    different = result["different"] = sum(node["different"] for node in result["nodes"].values())
    compared = result["compared"] = sum(node["compared"] for node in result["nodes"].values())
    print(f"{len(images.test_labels)} images, {compared} codes of {len(result['nodes'])} nodes, {different} differ")
    path = arguments.out / f"fixed-point-equality-{arguments.data}-{arguments.model}.json"
    write_json(path, result)
    return different


def run(arguments: argparse.Namespace) -> dict:
    images, model, result = start(arguments)
    result["stages"] = {}
    (float_epochs, float_lr), (full_epochs, full_lr) = SCHEDULES[arguments.data, arguments.model]
    path = arguments.out / f"fixed-point-{arguments.data}-{arguments.model}.json"

    def keep(stage: str, **values) -> None:
        result["stages"][stage] = values
        write_json(path, result)
        print(
            arguments.data,
            arguments.model,
            stage,
            {k: v for k, v in values.items() if k != "fraction_lengths"},
            flush=True,
        )

    settings = TrainSettings(
        epochs=float_epochs * arguments.scale, lr=float_lr, batch_size=arguments.batch_size, seed=arguments.seed
    )
    trained = train(model, images, settings, seconds=arguments.seconds)
    percent, loss = accuracy(model, images)
    keep("float32", accuracy=percent, loss=loss, epochs=settings.epochs, lr=settings.lr, **trained)
    for name in arguments.recipes.split(","):
        started = time.perf_counter()
        recipe = quantrain.Recipe.from_name(name)
        if arguments.per_channel:
            recipe.weight.granularity = "per_channel"
        prepared = prepare(model, recipe, images, arguments.seed)
        before, _ = accuracy(qnn.convert(copy.deepcopy(prepared).eval()), images)
        full = TrainSettings(
            epochs=full_epochs * arguments.scale, lr=full_lr, batch_size=arguments.batch_size, warmup=0.1
        )
        settings = TINY if name == "f8net-tiny" else full
        trained = train(prepared, images, settings, seconds=arguments.seconds)
        simulated, _ = accuracy(prepared, images)
        converted = qnn.convert(copy.deepcopy(prepared).eval())
        percent, loss = accuracy(converted, images)
        keep(
            name,
            accuracy=percent,
            loss=loss,
            simulated_accuracy=simulated,
            calibrated_accuracy=before,
            granularity=recipe.weight.granularity,
            lr=settings.lr,
            batch_size=settings.batch_size,
            **trained,
            equality=equality(prepared, converted, images),
            wall=time.perf_counter() - started,
            fraction_lengths=fraction_lengths(converted),
        )
        if arguments.save:
            converted.save(arguments.out / f"{arguments.data}-{arguments.model}-{name}.safetensors")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "equality"])
    parser.add_argument("--data", choices=["fashion-mnist", "cifar10-jpeg", "random"], default="fashion-mnist")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet20")
    parser.add_argument("--recipes", default="f8net,f8net-tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of each training before the comparison of codes")
    parser.add_argument("--seconds", type=float, help="limit of each training")
    parser.add_argument("--per-channel", action="store_true", help="fraction lengths of weights per channel")
    parser.add_argument("--save", action="store_true", help="write the integer networks too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part == "equality":
        sys.exit(run_equality(arguments) > 0)
    run(arguments)


if __name__ == "__main__":
    main()
