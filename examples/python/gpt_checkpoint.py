"""One safetensors file with all that a run needs to go on, the same in both languages.

Tensors: the model's under their names, ``optimizer.{exp_avg,exp_avg_sq,step}.<parameter>``, and ``rng.cpu.<rank>``,
``rng.cuda.<rank>`` (generator states). Metadata: ``format``, ``version``, ``step``, ``skipped``, ``scaler`` (JSON, the
keys of ``torch.amp.GradScaler.state_dict()``), ``config`` (JSON, sizes of the model), ``recipe`` (JSON, "" for none) and
``settings`` (JSON, what decides the course of the training).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantrain.nn import write_safetensors

FORMAT, VERSION = "quantrain-train-gpt", "1"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Checkpoint:
    """A file's content; ``path`` is for messages."""

    path: Path
    tensors: dict[str, Tensor]
    step: int
    skipped: int
    scaler: dict
    config: dict
    recipe: str
    settings: dict

    def save(self) -> None:
        """Write the file whole or not at all: an interrupted write leaves the earlier one."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "step": str(self.step),
            "skipped": str(self.skipped),
            "scaler": json.dumps(self.scaler),
            "config": json.dumps(self.config),
            "recipe": self.recipe,
            "settings": json.dumps(self.settings),
        }
        tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        write_safetensors(os.fspath(self.path), tensors, metadata)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Raises ValueError where the file is missing, damaged, or not of this program."""
        if not path.is_file():
            raise ValueError(f"{path}: expected a checkpoint file, got none")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: expected a whole safetensors file, got {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            found = f"{metadata.get('format', 'none')} {metadata.get('version', '')}".strip()
            raise ValueError(f"{path}: expected metadata format {FORMAT} {VERSION}, got {found}")
        parsed = {key: json.loads(metadata[key]) for key in ("step", "skipped", "scaler", "config", "settings")}
        return cls(path, tensors, recipe=metadata["recipe"], **parsed)

    def check_model(self, config: Mapping[str, int], recipe: str, *, float_allowed: bool = False) -> None:
        """Raises ValueError naming the size or the recipe in which the checkpoint's model is another one."""
        self._check("size", self.config, config)
        if self.recipe != recipe and not (float_allowed and not self.recipe):
            names = [json.loads(text)["name"] if text else "none" for text in (recipe, self.recipe)]
            raise ValueError(f"{self.path}: expected a checkpoint of recipe {names[0]}, got {names[1]}")

    def check_settings(self, settings: Mapping[str, object]) -> None:
        """Raises ValueError naming the setting in which the checkpoint's training is another one."""
        self._check("setting", self.settings, settings)

    def _check(self, kind: str, found: Mapping, expected: Mapping) -> None:
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.path}: expected a checkpoint with the {kind} {name} = {value}, got {found.get(name)} "
                    "(--restart begins again, --out names another folder)"
                )

    def load_model(self, model: nn.Module) -> None:
        """Copy the model's tensors; a float checkpoint leaves the fake-quantizers of a prepared model as they are."""
        state = model.state_dict()
        missing = [name for name in state if name not in self.tensors]
        if not self.recipe:
            missing = [name for name in missing if "_fake_quant." not in name]
        missing = [name for name in missing if not name.endswith("observer.frozen")]  # of earlier releases
        if missing:
            raise ValueError(f"{self.path}: expected every tensor of the model, got no {missing[0]!r}")
        found = {name: self.tensors[name] for name in state if name in self.tensors}
        for name, tensor in found.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{self.path}: expected {name!r} of shape {list(state[name].shape)}, got {list(tensor.shape)}"
                )
        model.load_state_dict(found, strict=False)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Set the moments and step counts of every parameter."""
        for name, parameter in model.named_parameters():
            moments = {}
            for key in MOMENTS:
                stored = self.tensors.get(f"optimizer.{key}.{name}")
                if stored is None:
                    raise ValueError(f"{self.path}: expected the optimizer's {key} of {name!r}, got none")
                shape = () if key == "step" else parameter.shape
                moments[key] = stored.to(parameter.device).reshape(shape).clone()
            optimizer.state[parameter] = moments


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's and the optimizer's tensors under the checkpoint's names."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            tensors[f"optimizer.{key}.{name}"] = optimizer.state[parameter][key]
    return tensors


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the default generators that a step draws from: ``cpu``, and ``cuda`` on a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_states(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Restore what :func:`rng_states` gave on this rank; a generator that the file does not hold stays as it is."""
    if (state := checkpoint.tensors.get(f"rng.cpu.{rank}")) is not None:
        torch.set_rng_state(state)
    if device.type == "cuda" and (state := checkpoint.tensors.get(f"rng.cuda.{rank}")) is not None:
        torch.cuda.set_rng_state(state, device)
