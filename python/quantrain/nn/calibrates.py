"""What a module says about itself in calibration, so that code for all models knows no family by name."""

from __future__ import annotations

__all__ = ["Calibrates"]


class Calibrates:
    """A module that rounds tensors and takes its ranges from them, or that calibration changes otherwise.

    Attributes:
        fake_quant_enabled: whether it rounds.
        end_order: modules with a lower one end calibration first; those whose range depends on another's come later.
    """

    fake_quant_enabled = True
    end_order = 1

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Turns rounding on or off; off, the module computes in floating point."""
        self.fake_quant_enabled = enabled

    def enable_observer(self, enabled: bool = True) -> None:
        """Lets the range follow training, or freezes it."""

    def begin_calibration(self) -> None:
        """From now on forward passes are seen and not rounded."""

    def end_calibration(self, keep: bool) -> None:
        """Takes over what was seen where ``keep``; else restores what was before."""

    def agree(self) -> None:
        """Under ``torch.distributed``, before the end: merges what the ranks saw."""

    def reached_by_calibration(self) -> str | None:
        """``"nothing"``, ``"zeros"`` or ``"something"``; None where the module is not shown tensors."""
        return None
