"""prepare in fixed point: a float model is traced, and rebuilt from layers that have an integer form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import Recipe

from .activation import FixedPointActivation, FixedPointInput
from .layers import FixedPointAvgPool2d, FixedPointConv2d, FixedPointLayer, FixedPointLinear
from .trace import PRODUCTS, Sharing, Step, maker_of, read_steps

__all__ = ["FixedPointGraph", "prepare_fixed_point"]


class FixedPointGraph(nn.Module):
    """A model rebuilt by ``prepare(model, "f8net")``: steps in order, and modules under the paths of the float model.

    Called with images ``[N, C, H, W]`` in real values. Returns logits in real values, in training and in evaluation.
    Parameters have the float model's names; a batch norm lies under its convolution (``<conv>.bn``), as does what
    quantizes the convolution's output (``<conv>.activation``); the images' is ``input_activation``.
    """

    input_activation: FixedPointInput

    def __init__(self, steps: list[Step]):
        super().__init__()
        self._steps = steps

    # Names of children are the float model's, which may be any but nn.Module's: what is added here begins with _.

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input)

    def _run(self, input: Tensor, watch: Callable[[Step, Tensor], None] | None = None) -> Tensor:
        """The forward pass; ``watch`` is called with every step and its output."""
        if self.input_activation.calibrating:
            for activation in activations_of(self):
                activation.restart_calibration()
        values: dict[str, Tensor] = {}
        for step in self._steps:
            operands = [input] if step.op == "input" else [values[name] for name in step.inputs]
            values[step.name] = self._run_step(step, operands)
            if watch is not None:
                watch(step, values[step.name])
        return values[self._steps[-1].name]

    def _run_step(self, step: Step, operands: list[Tensor]) -> Tensor:
        if step.op == "max_pool2d":
            a = step.arguments
            return F.max_pool2d(operands[0], a["kernel"], a["stride"], a["padding"])
        if step.op == "slice_pad":
            (row, column), (before, after) = step.arguments["stride"], step.arguments["pad"]
            return F.pad(operands[0][:, :, ::row, ::column], (0, 0, 0, 0, before, after))
        if step.op == "flatten":
            return operands[0].flatten(1)
        return self.get_submodule(step.module)(*operands)

    def _update_summary(self) -> None:
        """Brings the fraction lengths in ``quantization_summary`` up to date."""
        summary = getattr(self, "quantization_summary", None)
        if summary is not None:
            summary.rows = [dict(row) for row in summary_rows(self)]


def activations_of(prepared: FixedPointGraph) -> list[FixedPointActivation]:
    """Every activation, in order of registration."""
    return [module for module in prepared.modules() if isinstance(module, FixedPointActivation)]


def layers_of(prepared: FixedPointGraph) -> dict[str, FixedPointLayer]:
    """Every convolution and linear layer by its path."""
    return {name: module for name, module in prepared.named_modules() if isinstance(module, FixedPointLayer)}


class FixedPointAdd(nn.Module):
    """The sum of two tensors of codes, rounded to codes, where no convolution can hold it."""

    def __init__(self, output_activation: FixedPointActivation):
        super().__init__()
        object.__setattr__(self, "output_activation", output_activation)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.output_activation(a + b, False)


def prepare_fixed_point(model: nn.Module, recipe: Recipe) -> FixedPointGraph:
    """The prepared form of ``model``; see :func:`quantrain.nn.prepare`.

    Raises:
        ValueError: a model that torch.fx cannot trace, or an operation without integer form, named with its path. The
            model is unchanged.
    """
    steps = read_steps(model)
    if "input_activation" in model._modules:
        raise ValueError(
            "prepare: expected a model without a child 'input_activation' (that quantizes the images), got one"
        )
    return _build(model, recipe, steps)


def _build(model: nn.Module, recipe: Recipe, steps: list[Step]) -> FixedPointGraph:
    spec, by_name = recipe.scheme, {step.name: step for step in steps}
    sharing = Sharing(steps)
    device = next(iter(model.parameters())).device
    prepared = FixedPointGraph(steps)
    prepared.input_activation = FixedPointInput(device=device)
    activations: dict[str, FixedPointActivation] = {"input": prepared.input_activation}
    limits: dict[str, float] = {}
    for step in steps:
        if step.quantizes and step.op in (*PRODUCTS, "add"):
            first = sharing.first(step.name)
            limits[first] = min(limits.get(first, math.inf), math.inf if step.relu is None else step.relu)

    def activation_of(step: Step) -> FixedPointActivation:
        first = sharing.first(step.name)
        if first not in activations:
            limit = limits[first]
            activations[first] = FixedPointActivation(
                signed=by_name[first].relu is None,
                clip=spec.clip or limit < math.inf,
                fixed=not spec.clip,
                alpha=8.0 if spec.clip or limit == math.inf else limit,
                method=spec.fraction_length,
                max_alpha=limit,
                name=f"{first}.activation",
                device=device,
            )
        return activations[first]

    holders = {
        step.inputs[1]: step for step in steps if len(step.inputs) == 2 and not by_name[step.inputs[1]].quantizes
    }
    for step in steps:
        if step.op in PRODUCTS:
            source = activations[sharing.first(maker_of(by_name, step.inputs[0]).name)]
            output = activation_of(step) if step.quantizes else None
            if step.name in holders:
                output = activation_of(holders[step.name])
            layer = model.get_submodule(step.module)
            twin = FixedPointConv2d if step.op == "conv2d" else FixedPointLinear
            module = twin.from_float(
                layer,
                recipe,
                bn=model.get_submodule(step.bn) if step.bn else None,
                input_activation=source,
                output_activation=output,
                owner=step.quantizes and sharing.first(step.name) == step.name,
                quantizes=step.quantizes,
                name=step.name,
            )
        elif step.op == "avg_pool2d":
            source = activations[sharing.first(maker_of(by_name, step.inputs[0]).name)]
            module = FixedPointAvgPool2d(
                source, method=spec.fraction_length, name=step.name, device=device, **step.arguments
            )
            activations[step.name] = module.activation
        elif step.op == "add":
            module = FixedPointAdd(activation_of(step))
            step.module = step.name
        else:
            continue
        _register(prepared, step.module, module)
    return prepared.train(model.training)


def _register(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]
    for name, child in root._modules.get(last, nn.Module())._modules.items():
        module.add_module(name, child)
    root.add_module(last, module)


def summary_rows(prepared: FixedPointGraph) -> list[Mapping[str, Any]]:
    """Rows of PrepareSummary: what each layer's tensors are, with the fraction lengths as they are now."""
    rows = []
    for name, layer in layers_of(prepared).items():
        lengths = layer.weight_fraction_length.flatten().tolist()
        low, high = min(lengths), max(lengths)
        output = layer.output_activation
        rows.append(
            {
                "layer": name,
                "type": type(layer).__name__,
                "weight": f"int8 {layer.recipe.weight.granularity} ({layer.method})",
                "input": _codes(layer.input_activation),
                "output": _codes(output) if layer.quantizes else "int32",
                "fraction_length": str(low) if low == high else f"{low}-{high}",
            }
        )
    return rows


def _codes(activation: FixedPointActivation) -> str:
    return f"{'int8' if activation.signed else 'uint8'} FL {int(activation.rounded_fraction_length())}"
