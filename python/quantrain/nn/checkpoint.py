"""Checkpoints: one safetensors file, its tensors the model's state dict, its metadata what the numbers mean.

Metadata: ``format`` "quantrain", ``version`` "1", ``recipe`` (Recipe JSON, "" for a float model), ``converted`` "true"
or "false", ``layers`` (JSON: converted layer -> ``{"bits": b, "shape": [...]}`` of its weight before packing), and
``layer_recipes`` (JSON: ``{"recipes": [Recipe, ...], "of": {layer: index}}`` of every quantized layer). A pruned weight has a
buffer ``weight_mask``; of a converted layer that has one the file holds the codes that are kept (:mod:`.masked_codes`). The C++
library reads and writes the same files.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from quantrain._C import QuantSpec, Recipe, write_safetensors

from .convert import convert, is_converted
from .four_bit import FORMS, FourBitLayer, skeletons
from .fuse import differing_shares
from .int8_blocks import fuse_again, fuse_int8_blocks
from .layers import QuantEmbedding, QuantLayer
from .masked_codes import add_masks, keep_codes, spread_codes, take_new_masks
from .prepare import prepare, quantizable
from .quantized import QuantizedEmbedding, QuantizedLayer, name_codes
from .recipes import as_recipe
from .schemes import handler_of, handlers

__all__ = [
    "CheckpointInfo",
    "from_checkpoint",
    "load_checkpoint",
    "read_checkpoint_info",
    "save_checkpoint",
    "write_safetensors",
]

_FORMAT, _VERSION = "quantrain", "1"


def save_checkpoint(path: str | os.PathLike, model: nn.Module, recipe: Recipe | str | None = None) -> None:
    """Writes the state dict of a float, prepared or converted model to one safetensors file.

    The file appears whole or not at all (written beside it under a name of its own, synchronized, then renamed), even
    with several writers. Tied tensors are written under each name.

    Args:
        path: the file; an existing one is replaced.
        model: any module whose state dict holds tensors only.
        recipe: what the metadata says; by default the recipe ``prepare`` was given. It must match the model's layers.

    Raises:
        ValueError: a state dict entry that is not a tensor; a recipe that no layer of the model was made with.
        RuntimeError: the file cannot be written.

    >>> import tempfile, os
    >>> save_checkpoint(os.path.join(tempfile.mkdtemp(), "model.safetensors"), nn.Linear(2, 1))
    """
    for module in model.modules():
        if any(handler.is_converted(module) for handler in handlers()):
            name = type(module).__name__
            raise ValueError(
                "save_checkpoint: expected a model without an integer network, whose graph a checkpoint does not hold, got one: "
                f"{name}.save writes it, {name}.load reads it"
            )
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save_checkpoint: expected tensors in the state dict, got {type(value).__name__} at {name!r}"
            )
        tensors[name] = value.detach()
    converted = _converted_layers(model)
    if converted:
        keep_codes(tensors)
    if recipe is None:
        recipe = _recipe_of(model)
    else:
        recipe = as_recipe(recipe)
        _check_recipe_of(model, recipe)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "recipe": "" if recipe is None else recipe.to_json(),
        "converted": "true" if is_converted(model) else "false",
        "layers": json.dumps(converted),
        "layer_recipes": _layer_recipes_json(model),
    }
    write_safetensors(os.fspath(path), tensors, metadata)


def load_checkpoint(path: str | os.PathLike, model: nn.Module) -> dict[str, str]:
    """Reads a checkpoint into a model of the same structure; everything is checked before anything is copied.

    A converted checkpoint needs a converted model: ``convert(prepare(model, recipe), check_observed=False)``.

    Args:
        path: a file of :func:`save_checkpoint` or of the C++ library.
        model: its tensors are overwritten; floating-point ones keep their dtype.

    Returns:
        The file's metadata; ``Recipe.from_json(metadata["recipe"])`` is the recipe where that is not "".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a layer with another recipe or other bits; a truncated file, one that is not safetensors or not
            quantrain's, another version; missing or unexpected tensors; another shape, dtype or number of bits. The
            message names the file, the rule and the value; the model is then unchanged.
        ImportError: the package safetensors is not installed.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save_checkpoint(path, nn.Linear(2, 1))
    >>> load_checkpoint(path, nn.Linear(2, 1))["converted"]
    'false'
    """
    path = Path(path)
    metadata, tensors = _read(path)
    _check_metadata(path, metadata, model)
    if nowhere := [name for name, value in model.state_dict().items() if value.is_meta]:
        _fail(path, "a model whose tensors have memory (model.to_empty(device=...))", f"{nowhere[0]!r} on meta")
    spread_codes(str(path), tensors, {name: of["shape"] for name, of in _converted_layers(model).items()})
    name_codes(model, tensors)
    masks = take_new_masks(str(path), tensors, model)
    state = model.state_dict()
    _check_names(path, state, tensors)
    for name, tensor in tensors.items():
        want = state[name]
        if tensor.shape != want.shape:
            _fail(path, f"{name!r} of shape {list(want.shape)}", list(tensor.shape))
        floating = tensor.is_floating_point() and want.is_floating_point()
        if tensor.dtype != want.dtype and not floating:
            _fail(path, f"{name!r} of dtype {want.dtype}", tensor.dtype)
    if differing := differing_shares(model, tensors):
        _fail(path, "one value of what layers share", differing[0])
    given = type(state)({**{name: value for name, value in state.items() if _may_lack(name)}, **tensors})
    given._metadata = getattr(state, "_metadata", None)  # the versions that some modules' loading asks for
    model.load_state_dict(given)
    add_masks(masks)
    fuse_again(model)
    return metadata


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself, without its tensors.

    Attributes:
        recipe: The model's recipe; None for a plain float model.
        converted: Whether its layers hold integer codes.
        layers: Every quantized layer's own recipe (edge bits and overrides included); empty in files that do not say.
    """

    recipe: Recipe | None
    converted: bool
    layers: Mapping[str, Recipe] = field(default_factory=dict)


def read_checkpoint_info(path: str | os.PathLike) -> CheckpointInfo:
    """Reads a checkpoint's metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole checkpoint of this version.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save_checkpoint(path, nn.Linear(2, 1))
    >>> read_checkpoint_info(path).recipe is None
    True
    """
    path = Path(path)
    metadata = _read_metadata(path)
    _check_format(path, metadata)
    text = metadata.get("recipe", "")
    try:
        recipe = Recipe.from_json(text) if text else None
    except ValueError as error:
        _fail(path, "a valid recipe in the metadata", error)
    return CheckpointInfo(recipe, metadata.get("converted") == "true", _stored_layer_recipes(path, metadata) or {})


def from_checkpoint(
    path: str | os.PathLike, model: nn.Module, *, example_inputs: tuple | None = None, fuse_blocks: bool = True
) -> nn.Module:
    """The model a checkpoint was written from: ``model`` prepared with its recipe, converted where it is, and loaded.

    Args:
        path: a file of :func:`save_checkpoint` or of the C++ library.
        model: the float model, whose own values do not matter. It becomes the result where ``prepare`` works in place.
        example_inputs: as :func:`quantrain.nn.prepare` was given.
        fuse_blocks: of a converted model, as for :func:`convert`; the file does not say how blocks ran.

    Returns:
        The model in evaluation mode. ``train()`` goes on where a prepared checkpoint left off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an already quantized model; else as :func:`load_checkpoint`.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> save_checkpoint(path, prepare(nn.Sequential(nn.Linear(4, 2)), "qat-w4a8", overrides={"0": {"weight": {"bits": 3}}}))
    >>> from_checkpoint(path, nn.Sequential(nn.Linear(4, 2)))[0].recipe.weight.bits
    3
    """
    info = read_checkpoint_info(path)
    recipe = info.recipe
    if recipe is None and info.layers:
        recipe = Recipe.from_json(Counter(r.to_json() for r in info.layers.values()).most_common(1)[0][0])
    if recipe is not None:
        if handler_of(recipe).rebuilds or not info.layers:
            model = prepare(model, recipe, example_inputs=example_inputs)
        else:
            known = quantizable(model)
            skip = [name for name in known if name not in info.layers]
            kept = {name: value for name, value in info.layers.items() if name in known}
            with skeletons():
                model = prepare(model, recipe, overrides=kept, skip=skip, example_inputs=example_inputs)
        if info.converted:
            model = convert(model, check_observed=False, fuse_blocks=False)
        _take_forms(path, model)
    load_checkpoint(path, model)
    if info.converted and fuse_blocks:
        fuse_int8_blocks(model)
    return model.eval()


def _take_forms(path: Path, model: nn.Module) -> None:
    """Gives packed layers the buffers that only imported weights have, where the file says so."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FourBitLayer)}
    if layers:
        _, tensors = _read(Path(path))
        for name, layer in layers.items():
            prefix = f"{name}." if name else ""
            layer.take_form({part: tensors[prefix + part] for part in FORMS if prefix + part in tensors})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: expected a checkpoint file, got none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load_checkpoint: {path}: expected a whole safetensors file, got {path.stat().st_size} bytes ({error})"
        ) from error


def _read_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"read_checkpoint_info: expected a checkpoint file, got none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"read_checkpoint_info: {path}: expected a whole safetensors file, got {path.stat().st_size} bytes ({error})"
        ) from error


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    for handler in handlers():
        if handler.network_format is not None and metadata.get("format") == handler.network_format:
            _fail(path, "a checkpoint of a model", f"an integer network, which {handler.network_reader} reads")
    if metadata.get("format") != _FORMAT:
        _fail(path, f"metadata with format {_FORMAT!r}", metadata.get("format"))
    if metadata.get("version") != _VERSION:
        _fail(path, f"version {_VERSION!r}", metadata.get("version"))


def _check_metadata(path: Path, metadata: dict[str, str], model: nn.Module) -> None:
    _check_format(path, metadata)
    converted = metadata.get("converted")
    if converted == "true" and not is_converted(model):
        _fail(path, "a float or prepared checkpoint for this model", "a converted one (convert the model first)")
    if converted == "false" and is_converted(model):
        _fail(path, "a converted checkpoint for this model", "one that is not converted")
    try:
        layers = json.loads(metadata.get("layers", "{}"))
    except (json.JSONDecodeError, RecursionError):
        layers = None
    if not isinstance(layers, dict):
        _fail(path, "a JSON object in metadata 'layers'", metadata["layers"][:40])
    for name, want in _converted_layers(model).items():
        if name in layers and layers[name] != want:
            _fail(path, f"layer {name!r} with {want}", layers[name])
    _check_recipes(path, metadata, model)


def _check_recipes(path: Path, metadata: dict[str, str], model: nn.Module) -> None:
    """The file's layers must be quantized as the model's are."""
    ours, theirs = _layer_recipes(model), _stored_layer_recipes(path, metadata)
    if theirs is not None:
        for name, recipe in ours.items():
            want = _formats(recipe)
            if name not in theirs:
                _fail(path, f"layer {name!r} with {_text(want)}", "a layer in floating point")
            if (got := _formats(theirs[name], like=want)) != want:
                _fail(path, f"layer {name!r} with {_text(want)}", _text(got))
        return
    if ours and metadata.get("recipe"):  # a file without layer_recipes: its recipe is that of some layer
        stored = Recipe.from_json(metadata["recipe"])
        summary = getattr(model, "quantization_summary", None)
        if summary is not None and _formats(summary.recipe) == _formats(stored):
            return
        if not any(_made_with(recipe, stored) for recipe in ours.values()):
            name, recipe = next(iter(ours.items()))
            _fail(
                path, f"layer {name!r} with {_text(_formats(recipe))}", f"{_text(_formats(stored))} ({stored.name!r})"
            )


def _stored_layer_recipes(path: Path, metadata: Mapping[str, str]) -> dict[str, Recipe] | None:
    """Layer -> recipe as the file says; None where it does not."""
    if "layer_recipes" not in metadata:
        return None
    try:
        content = json.loads(metadata["layer_recipes"])
        recipes = [Recipe.from_json(json.dumps(recipe)) for recipe in content["recipes"]]
        return {name: recipes[_index(index)] for name, index in content["of"].items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        _fail(path, "recipes and the layers they are of in metadata 'layer_recipes'", error)


def _index(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected the index of a recipe, got {value!r}")
    return value


def _layer_recipes(model: nn.Module) -> dict[str, Recipe]:
    """Quantized layer -> its recipe, without the input of an embedding, which is indices."""
    recipes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantLayer, QuantizedLayer)):
            recipes[name] = layer.recipe
            if isinstance(layer, (QuantEmbedding, QuantizedEmbedding)):
                recipes[name] = Recipe.from_json(layer.recipe.to_json())
                recipes[name].input = None
    return recipes


def _layer_recipes_json(model: nn.Module) -> str:
    texts = {name: recipe.to_json() for name, recipe in _layer_recipes(model).items()}
    distinct = list(dict.fromkeys(texts.values()))
    of = {name: distinct.index(text) for name, text in texts.items()}
    return json.dumps({"recipes": [json.loads(text) for text in distinct], "of": of})


_Formats = dict[str, dict[str, int | bool | str]]


def _formats(recipe: Recipe, like: _Formats | None = None) -> _Formats:
    """Tensor -> what decides its codes; of ``like``'s tensors and the weight only where given and it has no input (an
    embedding)."""
    result: _Formats = {}
    for tensor in ("weight", "input", "output"):
        spec: QuantSpec | None = getattr(recipe, tensor)
        if spec is not None and not (tensor == "input" and like is not None and "input" not in like):
            result[tensor] = {"bits": spec.bits, "symmetric": spec.symmetric, "granularity": spec.granularity}
            if spec.format != "int":
                result[tensor]["format"] = spec.format
            if spec.granularity == "per_group":
                result[tensor]["group_size"] = spec.group_size
    if recipe.scheme is not None and recipe.scheme.stored_form:
        result["scheme"] = {"form": recipe.scheme.stored_form}
    return result


def _text(formats: _Formats) -> str:
    parts = []
    for tensor, f in formats.items():
        if tensor == "scheme":
            parts.append(f["form"])
            continue
        group = f" of {f['group_size']}" if "group_size" in f else ""
        codes = f.get("format", f"{'int' if f['symmetric'] else 'uint'}{f['bits']}")
        parts.append(f"{tensor} {codes} {f['granularity']}{group}")
    return ", ".join(parts)


def _made_with(layer: Recipe, recipe: Recipe) -> bool:
    want = _formats(layer)
    return want in (_formats(recipe, like=want), _formats(recipe.edge(), like=want))


def _check_recipe_of(model: nn.Module, recipe: Recipe) -> None:
    layers = _layer_recipes(model)
    layers |= {name: m.recipe for name, m in model.named_modules() if isinstance(getattr(m, "recipe", None), Recipe)}
    if not layers:
        raise ValueError(f"save_checkpoint: expected no recipe for a float model, got {recipe.name!r}")
    summary = getattr(model, "quantization_summary", None)
    if summary is not None and _formats(summary.recipe) == _formats(recipe):
        return
    if not any(_made_with(layer, recipe) for layer in layers.values()):
        name, layer = next(iter(layers.items()))
        raise ValueError(
            f"save_checkpoint: expected the recipe of the model's layers ({name!r}: {_text(_formats(layer))}), "
            f"got {recipe.name!r}: {_text(_formats(recipe))}"
        )


def _check_names(path: Path, state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if missing := [name for name in state if name not in tensors and not _may_lack(name)]:
        _fail(path, f"every tensor of the model ({len(missing)} missing)", _first(missing, "no"))
    if unexpected := [name for name in tensors if name not in state]:
        _fail(path, f"only tensors of the model ({len(unexpected)} unexpected)", _first(unexpected, ""))


def _may_lack(name: str) -> bool:
    """Whether files of earlier releases lack the tensor: the model's own value stays."""
    return name.endswith("observer.frozen")


def _first(names: Sequence[str], prefix: str) -> str:
    text = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{prefix} {text}".strip()


def _fail(path: Path, rule: str, value: object) -> None:
    raise ValueError(f"load_checkpoint: {path}: expected {rule}, got {value}")


def _recipe_of(model: nn.Module) -> Recipe | None:
    summary = getattr(model, "quantization_summary", None)
    if summary is not None:
        return summary.recipe
    layers = (m for m in model.modules() if isinstance(m, (QuantLayer, QuantizedLayer)))
    return next((layer.recipe for layer in layers), None)


def _converted_layers(model: nn.Module) -> dict[str, dict]:
    return {
        name: {"bits": layer.bits, "shape": list(layer.weight_shape)}
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
