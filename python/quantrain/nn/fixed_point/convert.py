"""convert under a recipe of fixed-point arithmetic: a prepared model to the graph and the integer tensors of a FixedPointNetwork."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from quantrain.tables import Table

from ..calibrate import evaluating
from ..weight_hooks import run_weight_hooks
from .activation import FixedPointActivation
from .layers import FixedPointLayer, Folded
from .network import FixedPointNetwork
from .prepare import FixedPointGraph, layers_of
from .trace import PRODUCTS, Step, maker_of

__all__ = ["audit", "fixed_point_program", "simulated_codes"]

kFormat, kVersion = "quantrain.fixed_point", 1
kAccumulators = 2**31  # every accumulator stays below, whatever the codes


def audit(model: nn.Module) -> Table:
    """What a converted model computes, operation by operation.

    Raises:
        ValueError: a model that is not a converted fixed-point one; an operation that is not an 8-bit multiplication, an
            addition, a shift, a comparison or a copy.
    """
    if isinstance(model, FixedPointNetwork):
        return model.audit()
    raise ValueError(
        f"audit: expected a model that convert made of one prepared with a fixed-point recipe, got {type(model).__name__}"
    )


def convert_fixed_point(model: FixedPointGraph) -> FixedPointNetwork:
    """The integer network of a prepared model, which stays as it is.

    Raises:
        ValueError: an accumulator that 32 bits may not hold, an image size that was never seen; named by layer.
    """
    graph, tensors = fixed_point_program(model)
    return FixedPointNetwork(graph, tensors)


def fixed_point_program(model: FixedPointGraph) -> tuple[str, dict[str, Tensor]]:
    """The graph (JSON text) and the tensors (int8 weights, int32 biases) of a prepared model's integer network.

    Raises:
        ValueError: as :func:`quantrain.nn.convert`.
    """
    with evaluating(model), torch.no_grad():
        run_weight_hooks(model)
        return _Writer(model).write()


class _Writer:
    def __init__(self, model: FixedPointGraph):
        self.model = model
        self.steps = {step.name: step for step in model._steps}
        self.tensors: dict[str, Tensor] = {}
        self.folded: dict[str, Folded] = {}

    def write(self) -> tuple[str, dict[str, Tensor]]:
        steps = self.model._steps
        source = self.model.input_activation
        nodes = [self.node(step) for step in steps if step.op != "input"]
        last = nodes[-1]["name"]
        maker = self.folded[maker_of(self.steps, last).name]
        exponent = -(maker.accumulator_fraction_length.double() + maker.exponent.double())
        graph = {
            "format": kFormat,
            "version": kVersion,
            "recipe": next(iter(layers_of(self.model).values())).recipe.to_json(),
            "input": {
                "name": "input",
                "channels": self.channels(),
                "signed": source.signed,
                "fraction_length": int(source.rounded_fraction_length()),
                "scale": float(source.step()),
            },
            "nodes": nodes,
            "output": {"name": last, "scale": float(torch.exp2(exponent))},
        }
        return json.dumps(graph, indent=1), self.tensors

    def channels(self) -> int:
        for step in self.model._steps:
            if step.op in PRODUCTS and maker_of(self.steps, step.inputs[0]).op == "input":
                layer = self.model.get_submodule(step.module)
                if step.op == "linear":
                    raise ValueError(
                        f"convert: '{step.name}': expected a convolution to read the images, got a Linear layer"
                    )
                return layer.in_channels
        raise ValueError("convert: expected a convolution to read the images, got none")

    def node(self, step: Step) -> dict[str, Any]:
        node: dict[str, Any] = {"name": step.name, "op": step.op, "inputs": list(step.inputs)}
        if step.op in PRODUCTS:
            return node | self.product(step)
        if step.op == "max_pool2d":
            return node | {key: list(step.arguments[key]) for key in ("kernel", "stride", "padding")}
        if step.op == "slice_pad":
            return node | {key: list(step.arguments[key]) for key in ("stride", "pad")}
        if step.op == "avg_pool2d":
            return node | self.pool(step)
        if step.op == "add":
            made = _output(self.model.get_submodule(step.module).output_activation)
            return node | {key: made[key] for key in ("signed", "fraction_length")}  # always codes
        return node

    def pool(self, step: Step) -> dict[str, Any]:
        pool = self.model.get_submodule(step.module)
        if 0 in pool.pixels:
            raise ValueError(
                f"convert: '{step.name}': expected an average pool that has seen an image, got none (calibrate or train first)"
            )
        activation = pool.activation
        return {
            "size": list(pool.pixels),
            "shift": activation.shift,
            "fraction_length": int(activation.rounded_fraction_length()),
        }

    def product(self, step: Step) -> dict[str, Any]:
        layer: FixedPointLayer = self.model.get_submodule(step.module)
        folded = self.folded[step.name] = layer.folded()
        if not bool(torch.isfinite(folded.bound).all()):
            raise ValueError(f"convert: '{step.name}': expected finite weights, got NaN or Inf")
        self.check_bound(step, layer, folded)
        self.tensors[f"{step.name}.weight"] = folded.codes.to(torch.int8)
        bias = folded.bias_codes if folded.bias_codes is not None else folded.bound.new_zeros(len(folded.bound))
        self.tensors[f"{step.name}.bias"] = bias.to(torch.int32)
        lengths = folded.fraction_length.flatten().tolist()
        node: dict[str, Any] = {}
        if step.op == "conv2d":
            node = {
                "kernel": list(layer.kernel_size),
                "stride": list(layer.stride),
                "padding": list(layer.padding),
                "groups": layer.groups,
                "channels": layer.out_channels,
            }
        else:
            node = {"features": layer.out_features}
        node["weight_fraction_length"] = lengths[0] if layer.axis is None else lengths
        return node | (_output(layer.output_activation) if step.quantizes else {"output": "accumulators"})

    def check_bound(self, step: Step, layer: FixedPointLayer, folded: Folded) -> None:
        """The accumulator and, where there is one, its sum with the residual fit 32 bits at the longer fraction length."""
        own = folded.accumulator_fraction_length.double()
        bound = folded.bound
        if len(step.inputs) == 2:
            other = maker_of(self.steps, step.inputs[1])
            if other.quantizes:
                length = layer.output_activation.rounded_fraction_length().double()
                most = torch.full_like(length, layer.output_activation.quant_max)
            else:
                length = self.folded[other.name].accumulator_fraction_length.double()
                most = self.folded[other.name].bound
            longer = torch.maximum(own, length)
            bound = bound * torch.exp2(longer - own) + most * torch.exp2(longer - length)
        if bool((bound >= kAccumulators).any()):
            raise ValueError(
                f"convert: '{step.name}': expected accumulators below 2^31, got up to {float(bound.max()):.0f} "
                f"in channel {int(bound.argmax())}"
            )


def _output(activation: FixedPointActivation) -> dict[str, Any]:
    return {
        "output": "codes",
        "signed": activation.signed,
        "fraction_length": int(activation.rounded_fraction_length()),
    }


@torch.no_grad()
def simulated_codes(model: FixedPointGraph, images: Tensor) -> dict[str, Tensor]:
    """The integers that a prepared model's evaluation stands for: step name -> int64 codes or accumulators, the input's too.

    Equal to what the converted network computes at every node. The model's mode stays as it is.

    Raises:
        ValueError: a value that is not an integer times the power of two it should be.
    """
    steps = {step.name: step for step in model._steps}
    codes: dict[str, Tensor] = {}

    def watch(step: Step, value: Tensor) -> None:
        maker = maker_of(steps, step.name)
        module = model.get_submodule(maker.module)
        if maker.quantizes:
            activation = getattr(module, "output_activation", None) or getattr(module, "activation", module)
            length = activation.rounded_fraction_length().double()
        else:
            folded = module.folded()
            length = folded.accumulator_fraction_length.double()
            if folded.exponent is not None:
                length = length + folded.exponent.double()
        rows = length if length.numel() == 1 else length.reshape(-1, *[1] * (value.dim() - 2))
        scaled = value.double() * torch.exp2(rows)
        if bool((scaled != scaled.round()).any()):
            raise ValueError(f"simulated_codes: '{step.name}': expected whole codes, got fractions")
        codes[step.name] = scaled.to(torch.int64)

    with evaluating(model):
        model._run(images, watch)
    return codes
