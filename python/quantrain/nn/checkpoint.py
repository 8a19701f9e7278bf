"""Checkpoints: one safetensors file, its tensors the model's state dict, its metadata what the numbers mean.

Metadata: ``format`` "quantrain", ``version`` "1", ``recipe`` (Recipe JSON, "" for a float model), ``converted`` "true" or
"false", ``layers`` (JSON: converted layer -> ``{"bits": b, "shape": [...]}`` of its weight before packing). The C++ library
reads and writes the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from quantrain._C import Recipe

from .convert import is_converted
from .layers import QuantLayer
from .quantized import QuantizedLayer, name_codes
from .recipes import as_recipe

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT, _VERSION = "quantrain", "1"


def save_checkpoint(path: str | os.PathLike, model: nn.Module, recipe: Recipe | str | None = None) -> None:
    """Writes the state dict of a float, prepared or converted model to one safetensors file.

    The file appears whole or not at all (written beside it, then renamed). Tied tensors are written under each name.

    Args:
        path: the file; an existing one is replaced.
        model: any module whose state dict holds tensors only.
        recipe: what the metadata says; by default the recipe ``prepare`` was given.

    Raises:
        ValueError: a state dict entry that is not a tensor.
        ImportError: the package safetensors is not installed.

    >>> import tempfile, os
    >>> save_checkpoint(os.path.join(tempfile.mkdtemp(), "model.safetensors"), nn.Linear(2, 1))
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save_checkpoint: expected tensors in the state dict, got {type(value).__name__} at {name!r}"
            )
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
    recipe = _recipe_of(model) if recipe is None else as_recipe(recipe)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "recipe": "" if recipe is None else recipe.to_json(),
        "converted": "true" if is_converted(model) else "false",
        "layers": json.dumps(_converted_layers(model)),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike, model: nn.Module) -> dict[str, str]:
    """Reads a checkpoint into a model of the same structure; everything is checked before anything is copied.

    A converted checkpoint needs a converted model: ``convert(prepare(model, recipe), check_observed=False)``.

    Args:
        path: a file of :func:`save_checkpoint` or of the C++ library.
        model: its tensors are overwritten; those of floating point keep their dtype.

    Returns:
        The file's metadata; ``Recipe.from_json(metadata["recipe"])`` is the recipe where that is not "".

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated file, one that is not safetensors or not quantrain's, another version; missing or unexpected
            tensors; another shape, dtype or number of bits. The message names the file, the rule and the value; the model is
            then unchanged.
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
    name_codes(model, tensors)
    state = model.state_dict()
    _check_names(path, state, tensors)
    for name, tensor in tensors.items():
        want = state[name]
        if tensor.shape != want.shape:
            _fail(path, f"{name!r} of shape {list(want.shape)}", list(tensor.shape))
        floating = tensor.is_floating_point() and want.is_floating_point()
        if tensor.dtype != want.dtype and not floating:
            _fail(path, f"{name!r} of dtype {want.dtype}", tensor.dtype)
    model.load_state_dict(tensors)
    return metadata


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


def _check_metadata(path: Path, metadata: dict[str, str], model: nn.Module) -> None:
    if metadata.get("format") != _FORMAT:
        _fail(path, f"metadata with format {_FORMAT!r}", metadata.get("format"))
    if metadata.get("version") != _VERSION:
        _fail(path, f"version {_VERSION!r}", metadata.get("version"))
    converted = metadata.get("converted")
    if converted == "true" and not is_converted(model):
        _fail(path, "a float or prepared checkpoint for this model", "a converted one (convert the model first)")
    if converted == "false" and is_converted(model):
        _fail(path, "a converted checkpoint for this model", "one that is not converted")
    try:
        layers = json.loads(metadata.get("layers", "{}"))
    except json.JSONDecodeError:
        _fail(path, "JSON in metadata 'layers'", metadata["layers"][:40])
    for name, want in _converted_layers(model).items():
        if name in layers and layers[name] != want:
            _fail(path, f"layer {name!r} with {want}", layers[name])


def _check_names(path: Path, state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if missing := [name for name in state if name not in tensors]:
        _fail(path, f"every tensor of the model ({len(missing)} missing)", _first(missing, "no"))
    if unexpected := [name for name in tensors if name not in state]:
        _fail(path, f"only tensors of the model ({len(unexpected)} unexpected)", _first(unexpected, ""))


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
