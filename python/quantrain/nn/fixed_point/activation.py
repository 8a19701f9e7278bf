"""What rounds the tensors of a fixed-point network: FixedPointActivation, also for its images and average pools."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quantrain.fixed_point import fixed_point_fraction_length, fixed_point_quantize

from ..calibrates import Calibrates
from ..fake_quantize import in_backward, kMinScale
from ..observers import Float32State, MSEObserver

__all__ = ["FixedPointActivation", "FixedPointInput", "FixedPointPoolActivation"]

kWordLength = 8
kInitialFractionLength = 6.0  # before the first batch, as published
kAveraging = 0.1  # weight of the new batch in the average of fraction lengths, as published


class FixedPointActivation(Calibrates, Float32State):
    """Rounds tensors to 8-bit codes, with a ReLU where unsigned and PACT's clip at a learned level.

    With qmax = 255 (unsigned) or 127 (signed), FL the rounded ``fraction_length`` and real value = units * eta:

    - ``clip``: eta = 2^FL * level / qmax with level = min(\\|alpha\\|, max_alpha); real value of code q: q * level /
      qmax, for any FL. Training: y = fake_quantize_learnable(x, level / qmax), which is eta * fix_quant(x / eta; FL)
      (section 3.3 of the paper).
    - else: eta = 1 and y = fix_quant(x; FL), the published fine-tuning of a few steps. An average pool's eta is that of
      its input times 2^shift / pixels.

    Evaluation: fix_quant(units; FL) = clamp(rint(units * 2^FL)) * 2^-FL in float32.

    Args:
        signed: codes -127 to 127, else 0 to 255.
        clip: a learned level; else none.
        method: "std" (of the tensor; of an unsigned one the root mean square after the ReLU) or "mse": how FL is
            chosen.
        max_alpha: the level never exceeds it (6 in place of a ReLU6).
        fixed: with ``clip``, ``alpha`` is a buffer (that of the network's input, or a ReLU6 without learned levels).
        alpha: the first level.
        name: what error messages call this module.

    State: ``alpha`` (Parameter ``[1]``), ``fraction_length`` (buffer, float32 ``[1]``: average of the batches' FL,
    weight 0.1 for the new one, first 6). Where several tensors share the activation (a chain of identity shortcuts), FL
    follows the first; without clip, the shortest.

    Gradient: LSQ's for x and alpha (0 < code < 255: dy/dalpha = (y - x) / alpha; 1 where x >= alpha; 0 where x <= 0);
    straight through without clip.

    >>> activation = FixedPointActivation(alpha=1.0)
    >>> activation(torch.tensor([-1.0, 0.5, 2.0]))
    tensor([0.0000, 0.4980, 1.0000], grad_fn=<...>)
    """

    end_order = 0  # the fraction lengths of weights follow the levels

    alpha: Tensor | None
    fraction_length: Tensor

    def __init__(
        self,
        signed: bool = False,
        *,
        clip: bool = True,
        method: str = "std",
        max_alpha: float = math.inf,
        fixed: bool = False,
        alpha: float = 8.0,
        name: str = "",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if method not in ("std", "mse"):
            raise ValueError(f"FixedPointActivation: expected method 'std' or 'mse', got {method!r}")
        if not alpha > 0:
            raise ValueError(f"FixedPointActivation: expected alpha > 0, got {alpha}")
        self.signed, self.clip, self.method, self.fixed = signed, clip, method, fixed
        self.max_alpha, self.name = max_alpha, name
        self.calibrating, self.fake_quant_enabled = False, True
        self.reached = False  # whether the last calibration showed it a tensor
        if clip:
            level = torch.full((1,), min(float(alpha), max_alpha), device=device)
            if fixed:
                self.register_buffer("alpha", level)
            else:
                self.alpha = nn.Parameter(level)
        else:
            self.alpha = None
        self.register_buffer("fraction_length", torch.full((1,), kInitialFractionLength, device=device))
        self.register_buffer("_before", torch.full((1,), kInitialFractionLength, device=device), persistent=False)

    @property
    def quant_max(self) -> int:
        return 127 if self.signed else 255

    @property
    def quant_min(self) -> int:
        return -127 if self.signed else 0

    def rounded_fraction_length(self) -> Tensor:
        """The FL in force: int32 ``[1]``, in 0 to 8 - signed."""
        return self.fraction_length.round().clamp(0, kWordLength - int(self.signed)).to(torch.int32)

    def level(self) -> Tensor:
        """The clipping level, float32 ``[1]``."""
        if self.training and not self.fixed:
            self.alpha.data.clamp_(min=kMinScale, max=self.max_alpha)  # in place, so that it can grow again
        return self.alpha.abs().clamp(min=kMinScale, max=self.max_alpha)

    def step(self) -> Tensor:
        """With clip: the real value of code 1."""
        return self.level() / self.quant_max

    def eta(self) -> Tensor:
        """Real value of one unit, float32 ``[1]``."""
        if not self.clip:
            return torch.ones_like(self.fraction_length)
        return torch.exp2(self.rounded_fraction_length().float()) * self.step()

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        """``x`` rounded: real values in training, units in evaluation; in calibration only the sign is applied.

        Args:
            first: the tensor is the first of those that share this activation.
        """
        if self.computes_in_float:
            x = x if self.signed else torch.relu(x)
            if self.calibrating and x.numel() > 0:
                self._calibrate(x)
            return x if self.max_alpha == math.inf else x.clamp(max=self.max_alpha)
        if not self.training:
            return self.rounded_units(x)
        if (first or not self.clip) and not in_backward():
            self._follow(x, first)
        return self.rounded_real(x)

    @property
    def computes_in_float(self) -> bool:
        """Not rounding: in calibration, and where fake-quantization is off."""
        return self.calibrating or not self.fake_quant_enabled

    def reached_by_calibration(self) -> str | None:
        return "something" if self.reached else "nothing"

    def rounded_real(self, x: Tensor) -> Tensor:
        if self.clip:
            codes = {"quant_min": self.quant_min, "quant_max": self.quant_max}
            quantize = torch.ops.quantrain.fake_quantize if self.fixed else torch.ops.quantrain.fake_quantize_learnable
            return quantize(x, self.step(), **codes)
        eta = self.eta()
        return fixed_point_quantize(x / eta, self.rounded_fraction_length(), signed=self.signed) * eta

    def rounded_units(self, units: Tensor) -> Tensor:
        """fix_quant(units; FL), exact; float32 out also for float64 in."""
        scale = torch.exp2(self.rounded_fraction_length().to(units.dtype))
        return ((units * scale).round().clamp(self.quant_min, self.quant_max) / scale).float()

    @torch.no_grad()
    def batch_fraction_length(self, x: Tensor) -> Tensor:
        """FL of one batch of real values, int32 ``[1]``."""
        x = x.detach()
        if not self.clip:
            x = x / self.eta()
        if not self.signed:
            x = torch.relu(x)
        method = "mse" if self.method == "mse" else "std" if self.signed else "rms"
        return fixed_point_fraction_length(x, signed=self.signed, method=method)

    @torch.no_grad()
    def _follow(self, x: Tensor, first: bool) -> None:
        if first:
            self._before.copy_(self.fraction_length)
        moved = torch.lerp(self._before, self.batch_fraction_length(x).float(), kAveraging)
        self.fraction_length.copy_(moved if first else torch.minimum(self.fraction_length, moved))

    def begin_calibration(self) -> None:
        self.calibrating = True
        self._observed: list[tuple[MSEObserver, list[Tensor]]] = []
        self._calls = 0

    def restart_calibration(self) -> None:
        """A new batch begins: the next tensor is the first of those that share this activation."""
        self._calls = 0

    @torch.no_grad()
    def end_calibration(self, keep: bool) -> None:
        """Sets level and FL from what was seen where ``keep``."""
        self.reached = bool(self._observed)
        if keep and self._observed:
            if self.clip and not (self.fixed and self.max_alpha < math.inf):
                highest = [torch.maximum(o.min_val.abs(), o.max_val.abs()) for o, _ in self._observed if o is not None]
                if highest:
                    level = torch.stack(highest).amax(0)
                    level = torch.where(torch.isfinite(level) & (level > 0), level, torch.ones_like(level))
                    self.alpha.copy_(level.clamp(max=self.max_alpha))
            averages = [torch.stack(seen).float().mean(0) for _, seen in self._observed]
            shortest = averages[0] if self.clip else torch.stack(averages).amin(0)
            self.fraction_length.copy_(shortest)
        self.calibrating = False
        del self._observed, self._calls

    def _calibrate(self, x: Tensor) -> None:
        if self._calls == len(self._observed):
            codes = {"quant_min": self.quant_min, "quant_max": self.quant_max, "symmetric": self.signed}
            self._observed.append((MSEObserver(**codes, name=self.name, device=x.device) if self.clip else None, []))
        observer, seen = self._observed[self._calls]
        if observer is not None:
            observer(x)
        seen.append(self.batch_fraction_length(x))
        self._calls += 1

    def extra_repr(self) -> str:
        return f"signed={self.signed}, clip={self.clip}, method={self.method!r}"


class FixedPointInput(FixedPointActivation):
    """The network's images as codes; ``alpha`` (buffer) is the largest magnitude that calibration saw, 1 before.

    Images without negative values have unsigned codes (for bytes scaled to [0, 1], the bytes themselves), others signed
    ones. Buffers ``alpha``, ``fraction_length``, ``is_signed`` (bool ``[1]``).
    """

    def __init__(self, *, method: str = "std", device: torch.device | str | None = None):
        super().__init__(False, method=method, fixed=True, alpha=1.0, name="input", device=device)
        self.register_buffer("is_signed", torch.zeros(1, dtype=torch.bool, device=device))

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        if self.computes_in_float:
            if self.calibrating and x.numel() > 0:
                self._seen.append(torch.stack(x.detach().float().aminmax()))
            return x
        if self.training:
            return super().forward(x, first)
        codes = (x.float() * (1 / self.step())).round().clamp(self.quant_min, self.quant_max)
        return codes * torch.exp2(-self.rounded_fraction_length().float())

    def _follow(self, x: Tensor, first: bool) -> None:
        """FL stays: eta is exact for any, and that of images does not change."""

    def begin_calibration(self) -> None:
        self.calibrating = True
        self._seen: list[Tensor] = []

    def restart_calibration(self) -> None:
        pass

    @torch.no_grad()
    def end_calibration(self, keep: bool) -> None:
        self.reached = bool(self._seen)
        if keep and self._seen:
            low, high = torch.stack(self._seen).amin(0)[0], torch.stack(self._seen).amax(0)[1]
            self._set_signed(bool(low < 0))
            largest = torch.maximum(low.abs(), high.abs())
            self.alpha.fill_(float(largest) if 0 < float(largest) < math.inf else 1.0)
            # The FL at which eta is nearest to 1, so that units are about real values.
            best = torch.log2(self.quant_max / self.alpha).round()
            self.fraction_length.copy_(best.clamp(0, kWordLength - int(self.signed)))
        self.calibrating = False
        del self._seen

    def _set_signed(self, signed: bool) -> None:
        self.signed = signed
        self.is_signed.fill_(signed)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.signed = bool(self.is_signed)


class FixedPointPoolActivation(FixedPointActivation):
    """Of an average pool: no clip, signed as what is pooled, eta = eta_in * 2^k / pixels."""

    end_order = 1  # after the source, whose level it takes

    def __init__(self, source: FixedPointActivation, *, method: str, name: str, device: torch.device | str | None):
        super().__init__(source.signed, clip=False, method=method, name=name, device=device)
        object.__setattr__(self, "source", source)
        self.pixels = (0, 0)

    @property
    def shift(self) -> int:
        return round(math.log2(max(self.pixels[0] * self.pixels[1], 1)))

    def eta(self) -> Tensor:
        count = max(self.pixels[0] * self.pixels[1], 1)
        return self.source.eta() * (2.0**self.shift / count)

    def _calibrate(self, x: Tensor) -> None:
        """Keeps the means: FL is that of units, whose eta is known once the source has its level."""
        self._observed.append(x.detach())

    @torch.no_grad()
    def end_calibration(self, keep: bool) -> None:
        self.reached = bool(self._observed)
        if keep and self._observed:
            lengths = [self.batch_fraction_length(x) for x in self._observed]
            self.fraction_length.copy_(torch.stack(lengths).float().mean(0))
        self.calibrating = False
        del self._observed, self._calls
