"""Optimizers: AdamW with moments of 8 bits a number."""

from quantrain.optim.adamw_8bit import AdamW8bit

__all__ = ["AdamW8bit"]
