"""Float32 master copies of 16-bit parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from quantrain import _C

__all__ = ["MasterWeights"]


class MasterWeights:
    """Float32 copies of a model's 16-bit parameters, for the optimizer: small updates add up there and are not lost.

    Args:
        parameters: The model's parameters, float16 or bfloat16; float32 ones are their own masters.
        stochastic_rounding: Write back rounded up or down at random, so that the 16-bit value is the master's on
            average: E[round(w)] = w. The numbers are Philox's, the same on CPU and CUDA.
        generator: Their source; None: PyTorch's default generator of the device.

    Raises:
        ValueError: A parameter of another type.

    Source: Micikevicius et al., arXiv:1710.03740, section 3.1.

    Example:
        >>> model = torch.nn.Linear(2, 1).to(torch.bfloat16)
        >>> masters = MasterWeights(model.parameters())
        >>> optimizer = torch.optim.SGD(masters.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        >>> masters.copy_gradients_()
        >>> optimizer.step()
        >>> masters.write_back_()
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        stochastic_rounding: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self._masters = _C.MasterWeights(list(parameters), stochastic_rounding, generator)

    def parameters(self) -> list[Tensor]:
        """The masters, one per parameter and in the same order: float32 leaves that require a gradient."""
        return self._masters.parameters()

    def copy_gradients_(self) -> None:
        """Copy the model's gradients, as float32, into the masters'; the model's are freed."""
        self._masters.copy_gradients_()

    def write_back_(self) -> None:
        """Write the masters' values, rounded to the model's type, into the model."""
        self._masters.write_back_()
