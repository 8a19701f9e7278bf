"""convert in fixed point: a prepared model to the graph and the integer tensors of a FixedPointNetwork."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain.tables import Table

from ..calibrate import evaluating
from ..weight_hooks import run_weight_hooks
from .activation import FixedPointActivation
from .layers import FixedPointLayer
from .network import FixedPointNetwork
from .prepare import FixedPointGraph, layers_of
from .trace import PRODUCTS, Step, maker_of

__all__ = ["audit", "fixed_point_program", "simulated_codes"]

kAccumulators = 2**31  # every accumulator stays below, whatever the codes


def audit(model: nn.Module) -> Table:
    """What a converted model computes, operation by operation.

    Raises:
        ValueError: a model that is not a converted fixed-point one; an operation that is not an 8-bit multiplication,
            an addition, a shift, a comparison or a copy.
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
    """Walks a prepared model and hands each step to the C++ writer, which alone knows the graph's text."""

    def __init__(self, model: FixedPointGraph):
        self.model = model
        self.steps = {step.name: step for step in model._steps}
        self.folded: dict[str, _C._FixedPointFolded] = {}

    def write(self) -> tuple[str, dict[str, Tensor]]:
        source = self.model.input_activation
        recipe = next(iter(layers_of(self.model).values())).recipe
        writer = _C._FixedPointProgramWriter(recipe, self.channels(), _codes(source), float(source.step()))
        for step in self.model._steps:
            if step.op != "input":
                self.node(writer, step)
        return writer.finish()

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

    def node(self, writer: _C._FixedPointProgramWriter, step: Step) -> None:
        name, inputs, given = step.name, list(step.inputs), step.arguments
        if step.op in PRODUCTS:
            self.product(writer, step)
        elif step.op == "max_pool2d":
            writer.max_pool2d(name, inputs[0], given["kernel"], given["stride"], given["padding"])
        elif step.op == "slice_pad":
            writer.slice_pad(name, inputs[0], given["stride"], given["pad"])
        elif step.op == "avg_pool2d":
            pool = self.model.get_submodule(step.module)
            if 0 in pool.pixels:
                raise ValueError(
                    f"convert: '{name}': expected an average pool that has seen an image, got none (calibrate or train first)"
                )
            length = int(pool.activation.rounded_fraction_length())
            writer.avg_pool2d(name, inputs[0], pool.pixels, pool.activation.shift, length)
        elif step.op == "add":
            writer.add(name, inputs, _codes(self.model.get_submodule(step.module).output_activation))
        else:
            writer.flatten(name, inputs[0])

    def product(self, writer: _C._FixedPointProgramWriter, step: Step) -> None:
        layer: FixedPointLayer = self.model.get_submodule(step.module)
        folded = self.folded[step.name] = layer.folded()
        self.check_bound(step, layer, folded)
        output = _codes(layer.output_activation) if step.quantizes else None
        if step.op == "conv2d":
            sizes = (layer.kernel_size, layer.stride, layer.padding)
            writer.conv2d(step.name, list(step.inputs), *sizes, layer.groups, folded, output)
        else:
            writer.linear(step.name, step.inputs[0], folded, output)

    def check_bound(self, step: Step, layer: FixedPointLayer, folded: _C._FixedPointFolded) -> None:
        """The accumulator, and its sum with a residual at the longer fraction length, must fit 32 bits."""
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


def _codes(activation: FixedPointActivation) -> tuple[bool, int]:
    """Whether codes are signed, and their fraction length."""
    return activation.signed, int(activation.rounded_fraction_length())


@torch.no_grad()
def simulated_codes(model: FixedPointGraph, images: Tensor) -> dict[str, Tensor]:
    """The integers that a prepared model's evaluation stands for: step name -> int64 codes or accumulators, the input's
    too.

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
