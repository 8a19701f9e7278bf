"""Linear maps from a student's width to the teacher's, outside of both models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Projections", "process_group_of", "reshard"]


class Projections:
    """One nn.Linear per pair whose widths differ: float32, orthogonal, zero bias.

    The weights depend on ``seed`` and the pair alone, so all ranks have the same; no global random state is read or
    moved. With a process group the gradients are averaged over its ranks as they arrive.
    """

    def __init__(self, seed: int, group: dist.ProcessGroup | None):
        self.seed, self.group = seed, group
        self.layers: dict[str, nn.Linear] = {}

    def __call__(self, key: str, hidden: Tensor, width: int) -> Tensor:
        """``[.., D]`` to ``[.., width]`` in the type of ``hidden``."""
        layer = self.layers[key]
        if (layer.in_features, layer.out_features) != (hidden.shape[-1], width):
            raise ValueError(
                f"Distiller: expected pair {key!r} to keep the widths of its projection, {layer.in_features} and "
                f"{layer.out_features}, got {hidden.shape[-1]} and {width}"
            )
        if layer.weight.device != hidden.device:  # made for, or loaded on, another device: before any step
            layer.to(hidden.device)
        return F.linear(hidden, layer.weight.to(hidden.dtype), layer.bias.to(hidden.dtype))

    def make(self, key: str, student: int, teacher: int, device: torch.device | None = None) -> None:
        layer = nn.utils.skip_init(nn.Linear, student, teacher, device="cpu")  # nn.Linear itself would draw numbers
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        with torch.no_grad():
            nn.init.orthogonal_(layer.weight, generator=generator)
            layer.bias.zero_()
        layer.to(device)
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(self._average)
        self.layers[key] = layer

    def parameters(self) -> Iterator[nn.Parameter]:
        for layer in self.layers.values():
            yield from layer.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": tensor.detach()
            for key, layer in self.layers.items()
            for name, tensor in layer.named_parameters()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
        """Copies what :meth:`state_dict` gave; projections that are not there yet are made."""
        keys = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
        expected = {f"{key}.{name}" for key in keys for name in ("weight", "bias")}
        for key in [*keys, *self.layers]:
            if key not in known or key not in keys:
                raise ValueError(
                    f"Distiller: expected a state of projections of these pairs, got {key!r} in "
                    f"{'no pair' if key in keys else 'the distiller alone'}"
                )
        if expected != set(state):
            raise ValueError(
                "Distiller: expected weight and bias of each projection, got "
                f"{', '.join(sorted(expected ^ set(state)))}"
            )
        for key in keys:
            shape, layer = state[f"{key}.weight"].shape, self.layers.get(key)
            if layer is not None and layer.weight.shape != shape:
                raise ValueError(
                    f"Distiller: expected the projection of {key!r} to be {list(layer.weight.shape)}, got {list(shape)}"
                )
        for key in keys:
            if key not in self.layers:
                width, own = state[f"{key}.weight"].shape
                self.make(key, own, width)
            with torch.no_grad():
                for name, parameter in self.layers[key].named_parameters():
                    parameter.copy_(state[f"{key}.{name}"])

    def _average(self, parameter: nn.Parameter) -> None:
        """What a rank has accumulated before is equal on all, so the mean of the sums is the sum of the means."""
        if self.group is not None:
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad.div_(dist.get_world_size(self.group))


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which the model's gradients are averaged: DistributedDataParallel's or fully_shard's group."""
    while (inner := getattr(model, "_orig_mod", None)) is not None:
        model = inner
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor  # takes a while to import

    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if sharded is None:
        return None
    mesh = sharded.device_mesh
    return mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD


def reshard(model: nn.Module) -> None:
    """After a pass without a backward one: of a fully_shard model's root, parameters would else be plain tensors, which
    an optimizer made then would hold in vain."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule  # takes a while to import

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
