"""GradientProbe: what quantizing a model's gradients would cost, layer by layer, and which layers need more bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantrain import _C
from quantrain._C import GradientSpec
from quantrain.tables import Table

from .layers import QuantEmbedding, QuantLayer

__all__ = ["GradientProbe", "ProbeTable"]

DEFAULT_QUANTIZERS = ("per_tensor:5", "per_sample:5", "householder:5")


class ProbeTable(Table):
    """What a :class:`GradientProbe` measured: one row per layer and quantizer, the advice below.

    ``rows`` hold the keys of :attr:`GradientProbe.rows`, and ``noise_pct`` and ``bound_pct`` (variance and bound,
    percent of ``gradient_square``), ``batch_pct`` (what the advice compares, percent of the batch variance) and
    ``bits_needed``.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], advice: Sequence[dict[str, Any]]):
        found = {(entry["layer"], _spec_key(entry["quantizer"])): entry for entry in advice}
        columns = {
            "layer": "layer",
            "name": "quantizer",
            "bias_z": "bias z",
            "noise_pct": "noise %",
            "bound_pct": "bound %",
            "batch_pct": "of batch variance %",
            "bits_needed": "bits needed",
        }
        super().__init__(
            columns, [_shown(row, found) for row in rows], title="gradient quantization", notes=_advice_notes(advice)
        )


class GradientProbe:
    """Measures, per layer and quantizer, bias, variance and bound of the quantized gradient, and the batch variance.

    With g the gradient of a layer's linear map as [N, D], Q a quantizer of b bits, B = 2^b - 1 (StatQuant, Chen et al.
    2020, arXiv:2010.14298): theorem 1, E[Q(g)] = g (``bias_z``: above 5 it does not hold); theorem 2, what a layer's Q
    adds to the variance of the weight gradients over batches (``weight_variance``: its own; ``network_variance``: and
    those of all layers before); theorem 3, E||Q(g) - g||^2 <= (D / 4) ||S^-1||_F^2 (``variance`` and ``bound``),
    proportional to 1 / B^2.

    A context manager: within it every QuantLinear, QuantConv2d and QuantConvBn2d, and every nn.Linear and nn.Conv2d of
    a float model, is watched. The model's gradients and PyTorch's generators are not touched. All numbers come from the
    C++ class ``quantrain::nn::GradientProbe`` (<quantrain/nn/gradient_probe.h>). Not for compiled or captured models.

    Args:
        model: what to watch; None for a probe that is only shown gradients by :meth:`observe`.
        quantizers: each ``"quantizer:bits"``, ``"quantizer:bits:rows"`` or a :class:`quantrain.GradientSpec`.
        draws: per gradient and quantizer; even, at least 4.
        fraction: what quantization may add to the batch variance, for :meth:`recommend`.
        seed: of the draws.
        quantize: stands in for the quantizer: (float32 [N, D], spec, number of the draw) -> float32 [N, D].

    Raises:
        ValueError: a quantizer, number of draws or fraction outside its rule; within, a model without such layers.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> with GradientProbe(model, ["per_sample:5"]) as probe:
    ...     for seed in range(3):
    ...         model.zero_grad()
    ...         model(torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    ...         probe.end_batch()
    >>> [(row["layer"], row["variance"] <= row["bound"]) for row in probe.rows]
    [('0', True)]
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        quantizers: Sequence[GradientSpec | str] = DEFAULT_QUANTIZERS,
        *,
        draws: int = 8,
        fraction: float = 0.1,
        seed: int = 0,
        quantize: Callable[[Tensor, GradientSpec, int], Tensor] | None = None,
    ):
        specs = [_C.probe_quantizer(spec) if isinstance(spec, str) else spec for spec in quantizers]
        self.model = model
        self._probe = _C.GradientProbe(quantizers=specs, draws=draws, fraction=fraction, seed=seed, quantize=quantize)
        self._detach: list[Callable[[], None]] = []

    def __enter__(self) -> GradientProbe:
        if self.model is not None:
            self.attach(self.model)
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def attach(self, model: nn.Module) -> None:
        """Watches the layers of ``model`` until :meth:`detach`.

        Raises:
            ValueError: none to watch.
        """
        before = len(self._detach)
        for name, module in model.named_modules():
            if isinstance(module, QuantLayer) and not isinstance(module, QuantEmbedding):
                module.output_hook = partial(self._watch_quantized, name or "(model)")
                self._detach.append(partial(setattr, module, "output_hook", None))
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                handle = module.register_forward_hook(partial(self._watch_float, name or "(model)"))
                self._detach.append(handle.remove)
        if len(self._detach) == before:
            raise ValueError(
                "GradientProbe.attach: expected a model with a linear layer or convolution, got one without"
            )

    def detach(self) -> None:
        """Ends the watching; what was measured stays."""
        while self._detach:
            self._detach.pop()()

    def _watch_quantized(self, name: str, layer: QuantLayer, output: Tensor) -> None:
        self._probe.watch(name, output, layer.weight, not layer.quantizes_gradients)

    def _watch_float(self, name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        self._probe.watch(name, output, layer.weight)

    def observe(self, layer: str, grad: Tensor, rows: str = "auto") -> None:
        """Adds a gradient of a layer's output, of any float type and strides; NaN, Inf and empty ones count as skipped.

        Args:
            layer: its name in the results.
            grad: at least one dimension.
            rows: "sample" (dimension 0), "token" (all dimensions but the last), or "auto": sample for four dimensions.

        Raises:
            TypeError: an integer gradient.
            ValueError: no dimension, or another word for rows.
        """
        self._probe.observe(layer, grad, rows)

    def end_batch(self) -> None:
        """After a backward pass: the weights' gradients are one batch's (zero them before each batch)."""
        self._probe.end_batch()

    def end_repeat(self) -> None:
        """After another backward pass over the last :meth:`end_batch`'s batch: for models that quantize gradients."""
        self._probe.end_repeat()

    def measure_network(self, loss: Callable[[], Tensor], repeats: int = 2) -> None:
        """Measures ``network_variance`` on one batch: the sum over k <= l of theorem 2, over all watched weights.

        Runs ``loss`` once, then a backward pass for each layer, quantizer and repeat, with that layer's gradient alone
        quantized. Parameters' ``grad`` are not touched.

        Args:
            loss: runs the watched model and returns the scalar loss.
            repeats: passes per layer and quantizer; one is an unbiased estimate.

        Raises:
            ValueError: layers that quantize their gradients (``enable_gradient_quant(model, False)`` turns that off).
        """
        self._probe.measure_network(loss, repeats)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer and quantizer, means over the layer's observed gradients.

        ``layer``, ``quantizer`` (GradientSpec), ``rows`` (N), ``columns`` (D), ``observations``, ``skipped``,
        ``gradient_square`` (||g||^2), ``variance`` (from the draws), ``exact_variance`` (sum of p (1 - p) scale^2),
        ``bound``, ``bias_z``, and, None where not measured, ``weight_variance`` and ``network_variance``.
        """
        return self._probe.rows()

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One dict per layer: ``batches``, and of its weight gradient ``gradient_square`` (of the mean),
        ``batch_variance``, ``repeat_variance``."""
        return self._probe.layers()

    def recommend(self, fraction: float | None = None) -> list[dict[str, Any]]:
        """The bits each layer needs, those first that have too few.

        ``bits_needed`` is the smallest b' in 2 to 8 with ``ratio`` (B / B')^2 <= ``allowed``; 9 where 8 is not enough.
        ``basis`` "network": ratio = network_variance / the batch variance of all layers together, allowed = fraction /
        number of layers; "weight": ratio = weight_variance / the layer's batch variance, allowed = fraction.

        Args:
            fraction: None takes the probe's.
        """
        return self._probe.recommend(0.0 if fraction is None else fraction)

    @property
    def table(self) -> ProbeTable:
        """The rows and the advice, to print."""
        return ProbeTable(self.rows, self.recommend())

    def to_json(self) -> str:
        """Options, ``rows``, ``layers`` and ``advice`` under their names above."""
        return self._probe.to_json()

    def plot(self, path: str | os.PathLike) -> None:
        """Writes a PNG: noise and bound by layer, and the part of the batch variance against what is allowed.

        Raises:
            ImportError: matplotlib is not installed (extra [train]).
            ValueError: nothing was observed.
        """
        from quantrain.nn.gradient_probe_plot import plot_probe

        plot_probe(self.rows, self.recommend(), path)


def _spec_key(spec: GradientSpec) -> str:
    return spec.to_json()


def spec_name(spec: GradientSpec) -> str:
    """``"quantizer:bits"``."""
    return f"{spec.quantizer}:{spec.bits}"


def _shown(row: dict[str, Any], advice: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    square = row["gradient_square"]
    entry = advice.get((row["layer"], _spec_key(row["quantizer"])), {})
    shown = {**row, "name": spec_name(row["quantizer"]), "bits_needed": entry.get("bits_needed")}
    shown["noise_pct"] = 100 * row["variance"] / square if square else None
    shown["bound_pct"] = 100 * row["bound"] / square if square else None
    shown["batch_pct"] = 100 * entry["ratio"] if entry else None
    return shown


def _advice_notes(advice: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for entry in advice:
        bits, spec = entry["bits_needed"], entry["quantizer"]
        if bits > spec.bits:
            needed = "more than 8 bits" if bits > 8 else f"{bits} bits"
            limit = f"{100 * entry['ratio']:.3g} % of the batch variance, {100 * entry['allowed']:.3g} % allowed"
            notes.append(f"{entry['layer']}: {spec.quantizer} needs {needed}, has {spec.bits} ({limit})")
    if advice and not notes:
        notes.append("every layer has the bits it needs")
    return notes
