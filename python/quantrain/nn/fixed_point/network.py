"""FixedPointNetwork: a network in integers as a module, from float images to float logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantrain import _C
from quantrain.tables import Table

__all__ = ["FixedPointNetwork"]

_COLUMNS = {
    "name": "layer",
    "op": "op",
    "operations": "operations",
    "operands": "operands",
    "accumulator": "accumulator",
    "result": "result",
    "bound": "largest sum",
}


class FixedPointNetwork(nn.Module):
    """Wraps an integer network: ``forward`` takes float images and gives float logits; everything between is integers.

    8-bit codes are multiplied, summed in int32 and shifted, with no float and no scale (F8Net, Jin et al., ICLR 2022);
    what each layer does is in :meth:`audit`. The network itself, which takes codes and gives int32, is :attr:`network`,
    a ``quantrain._C.FixedPointNetwork`` with ``forward(codes)``, ``forward_all(codes)`` (every node's integers by
    name), ``quantize_input(images)``, ``dequantize_output(integers)``, ``graph()`` and ``tensors()``. Calls from
    several threads are safe and wait for each other; the interpreter is free meanwhile. No gradients. On CUDA it can be
    captured in a CUDA graph after one call.

    The state dict holds int8 and int32 tensors alone, ``<layer>.weight`` and ``<layer>.bias``. Loading one makes the
    network anew, with every check, and changes nothing where one fails. ``.to(device)`` moves the network; dtypes stay.

    Args:
        network: what to wrap, or the graph (JSON text or a dict) of a network.
        tensors: with a graph, the named tensors.

    Raises:
        ValueError: a graph or tensors that do not fit, or a layer whose sums could pass int32 (the message names it).

    >>> graph = {"format": "quantrain.fixed_point", "version": 1, "recipe": "",
    ...          "input": {"name": "input", "channels": 1, "signed": False, "fraction_length": 8, "scale": 1 / 255},
    ...          "nodes": [{"name": "conv", "op": "conv2d", "inputs": ["input"], "kernel": [1, 1], "stride": [1, 1],
    ...                     "padding": [0, 0], "groups": 1, "channels": 1, "weight_fraction_length": 6, "output": "codes",
    ...                     "signed": False, "fraction_length": 7}],
    ...          "output": {"name": "conv", "scale": 0.5}}
    >>> tensors = {"conv.weight": torch.full((1, 1, 1, 1), 64, dtype=torch.int8),
    ...            "conv.bias": torch.zeros(1, dtype=torch.int32)}
    >>> FixedPointNetwork(graph, tensors)(torch.ones(1, 1, 1, 1)).item()
    64.0
    """

    network: _C.FixedPointNetwork

    def __init__(
        self, network: _C.FixedPointNetwork | str | Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ):
        super().__init__()
        if isinstance(network, _C.FixedPointNetwork):
            if tensors is not None:
                raise ValueError("FixedPointNetwork: expected tensors with a graph only, got them with a network")
        else:
            graph = network if isinstance(network, str) else json.dumps(network)
            network = _C.FixedPointNetwork(graph, dict(tensors or {}))
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Float images [N, C, H, W] to float32 logits; where the output node makes an image, to that.

        Raises:
            TypeError: images that are not floating point.
            ValueError: another number of channels, or an image size that the network does not take.
        """
        return self.network.dequantize_output(self.network.forward(self.network.quantize_input(images)))

    def audit(self) -> Table:
        """One row per layer: operations, operands, accumulator, result, and the proven bound of its sums (below 2^31).

        Raises:
            ValueError: an operation other than a product of 8-bit codes, an addition, a shift, a comparison or a copy.
        """
        rows = [{key: value or None for key, value in row.items()} for row in self.network.audit()]
        return Table(_COLUMNS, rows, title="integer network", notes=["no other operations"])

    def save(self, path: str | os.PathLike) -> None:
        """Writes tensors and graph to one file, ``path`` (safetensors, the graph and a checksum as metadata).

        The file is the old one or the new one, whole, even if the process is killed. The C++ class reads and writes the
        same file (<quantrain/nn/fixed_point/network.h>).

        Raises:
            ValueError: a path that ends in .json.
        """
        self.network.save(os.fspath(path))

    @classmethod
    def load(cls, path: str | os.PathLike) -> FixedPointNetwork:
        """Reads the file that :meth:`save` wrote, or the two files of version 1 (tensors, and the graph as .json).

        Raises:
            FileNotFoundError: it is missing.
            ValueError: a byte was changed, the file was truncated, or the two files are not of one network.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"FixedPointNetwork.load: expected a file, got none at {path}")
        return cls(_C.FixedPointNetwork.load(os.fspath(path)))

    def extra_repr(self) -> str:
        graph = json.loads(self.network.graph())
        return f"{len(graph['nodes'])} nodes, input {graph['input']['channels']} channels, {self.network.device}"

    def __reduce__(self) -> tuple:
        return FixedPointNetwork, (self.network.graph(), self.network.tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPointNetwork:
        super()._apply(fn, recurse)
        # A dtype conversion leaves integers alone, so that this tells of a device alone.
        self.network = self.network.to(fn(torch.zeros(1, dtype=torch.int8, device=self.network.device)).device)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.network.tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        given = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        own = self.network.tensors()
        missing_keys += [prefix + name for name in own if name not in given]
        if strict:
            unexpected_keys += [prefix + name for name in given if name not in own]
        tensors = {name: given.get(name, tensor).to(tensor.device) for name, tensor in own.items()}
        try:
            self.network = _C.FixedPointNetwork(self.network.graph(), tensors)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
