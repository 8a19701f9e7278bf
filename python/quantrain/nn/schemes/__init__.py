"""Schemes: how layers run beyond rounding their tensors. A recipe has one or none.

A scheme is a file here, which registers a :class:`SchemeHandler`, and a C++ file that names its fields (nn/schemes/).
Everything that serves all layers (prepare, calibrate, convert, report, checkpoints, jobs) asks the handler of a recipe
and knows none by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from quantrain._C import GradientSpec, Recipe

if TYPE_CHECKING:
    from ..layers import QuantLayer
    from ..quantized import QuantizedLayer

__all__ = ["SchemeHandler", "handler_of", "handlers", "register"]


class SchemeHandler:
    """What a scheme does with layers; this class is the handler of recipes without one.

    Attributes:
        kind: what the recipe's scheme calls itself; "" for recipes without one.
        rebuilds: whether ``prepare`` makes a new network of the whole model, and ``convert`` another, rather than swap
            layers.
        packs: whether the layers of ``prepare`` store codes at once, so that ``convert`` leaves them as they are.
        summary_columns: key -> header of columns that the scheme adds to the summary, shown where a row has a value.
        network_format, network_reader: the format that the files of converted networks name, where they are no
            checkpoints of modules, and what reads them.
    """

    kind: ClassVar[str] = ""
    rebuilds: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    summary_columns: ClassVar[dict[str, str]] = {}
    network_format: ClassVar[str | None] = None
    network_reader: ClassVar[str] = ""

    # Layers

    def layer_class(self, twin: type[QuantLayer], recipe: Recipe) -> type[QuantLayer]:
        """The prepared layer in place of ``twin``, that of recipes without a scheme."""
        return twin

    def left_float(self, twin: type[QuantLayer], recipe: Recipe) -> str:
        """Why layers of that kind stay in floating point, as the recipe means them to, or ""."""
        return ""

    def no_twin(self, twin: type[QuantLayer], recipe: Recipe) -> str:
        """Why layers of that kind stay in floating point, for want of a way to run them so, or ""."""
        return ""

    def layer_recipe(self, name: str, recipe: Recipe) -> Recipe:
        """The recipe of the layer at that path, where its place in the model decides."""
        return recipe

    def left_layers(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        recipes: Mapping[str, Recipe],
        order: Sequence[str],
    ) -> dict[str, str]:
        """Float layers of this scheme's recipes that stay so for their place in the model -> why.

        Args:
            layers, recipes: by name.
            order: the names of all linear layers of the model, these or not, in order of call or of registration.
        """
        return {}

    def check_model(self, model: nn.Module, recipe: Recipe) -> None:
        """Raises ValueError where the model is none for the recipe, before anything of it changes."""

    def prepared(
        self, model: nn.Module, layers: Mapping[str, nn.Module], left_float: Mapping[str, str], recipe: Recipe
    ) -> None:
        """Called with the model when its layers are swapped; ``layers``: those of this scheme's recipes; ``recipe``: the
        model's, of this scheme or another."""

    def leaves_layers(self, recipe: Recipe) -> bool:
        """Whether the recipe is for more than layers, so that a model without one to swap is prepared as it is."""
        return False

    def takes_float64(self, recipe: Recipe) -> bool:
        return True

    def check_layer(self, layer: QuantLayer) -> None:
        """Raises ValueError where such a layer does not run so; it has its recipe and no quantizers yet."""

    def linear(self, recipe: Recipe) -> Callable[..., Tensor] | None:
        """The product of prepared linear layers, called as ``F.linear``, where its backward pass is not the float
        product's; None: it is."""
        return None

    def conv2d(self, recipe: Recipe) -> Callable[..., Tensor] | None:
        """As :meth:`linear`, called as ``F.conv2d``; also of one-dimensional convolutions."""
        return None

    def converted_class(self, layer: QuantLayer, twin: type[QuantizedLayer] | None) -> type[QuantizedLayer] | None:
        """The converted layer in place of ``twin``, that of recipes without a scheme (None: of a layer that only the
        scheme knows)."""
        return twin

    def summary_cells(self, layer: QuantLayer) -> dict[str, str | None]:
        """A layer's cells of ``summary_columns``."""
        return {}

    def gradient_specs(self, recipe: Recipe) -> list[GradientSpec]:
        """How the recipe quantizes the gradient of a layer's output, where a probe should try that."""
        return []

    # Networks, where ``rebuilds``

    def prepare_network(self, model: nn.Module, recipe: Recipe) -> nn.Module:
        raise NotImplementedError(f"the scheme {self.kind!r} rebuilds no network")

    def convert_network(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError(f"the scheme {self.kind!r} rebuilds no network")

    def summary_rows(self, model: nn.Module) -> list[dict[str, Any]]:
        raise NotImplementedError(f"the scheme {self.kind!r} rebuilds no network")

    def is_prepared(self, model: nn.Module) -> bool:
        """Whether ``model`` is what ``prepare_network`` returned."""
        return False

    def calibrated(self, model: nn.Module) -> None:
        """Called with the prepared network when calibration has set its ranges."""

    def is_converted(self, model: nn.Module) -> bool:
        """Whether ``model`` is from ``convert_network``. It has ``save``, a class method ``load`` and ``audit``."""
        return False

    # Texts of reports

    def spec_text(self, recipe: Recipe, text: str) -> str:
        """How one tensor is quantized; ``text`` is what its spec says."""
        return text

    def gradient_text(self, recipe: Recipe) -> str:
        return ""

    def edge_text(self, recipe: Recipe) -> str:
        """What becomes of the first and the last layer, where that is not what becomes of the others."""
        return f"{recipe.edge_bits} bits" if recipe.edge_bits else ""

    def training_text(self, recipe: Recipe) -> str:
        return "fine-tuned" if recipe.training else "calibrated only"

    def arithmetic_text(self, recipe: Recipe) -> str:
        return "rounded, computed in floating point"


_HANDLERS: dict[str, SchemeHandler] = {}


def register(handler: SchemeHandler) -> SchemeHandler:
    """Makes the handler of a kind known.

    Raises:
        ValueError: a kind that has a handler.
    """
    if handler.kind in _HANDLERS:
        raise ValueError(f"register: expected a kind without a handler, got {handler.kind!r}")
    _HANDLERS[handler.kind] = handler
    return handler


def handler_of(recipe: Recipe) -> SchemeHandler:
    """The handler of the recipe's scheme.

    Raises:
        ValueError: a scheme that has none in Python.
    """
    kind = "" if recipe.scheme is None else recipe.scheme.kind
    if kind not in _HANDLERS:
        raise ValueError(
            f"recipe {recipe.name!r}: expected a scheme of {', '.join(filter(None, _HANDLERS))}, got {kind!r}"
        )
    return _HANDLERS[kind]


def handlers() -> list[SchemeHandler]:
    return list(_HANDLERS.values())


register(SchemeHandler())
