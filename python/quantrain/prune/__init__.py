"""Pruning: fewer weights, as zeros that stay zeros, or as smaller layers.

Masks: :func:`magnitude`, :func:`wanda`, :func:`sparsegpt` at once, :class:`Pruner` by a schedule while a model trains;
:func:`keep_pruned` has an optimizer leave them at zero. Smaller layers: :func:`remove_channels`, :func:`remove_heads`,
:func:`remove_ffn_rows`, :func:`remove_layers`. The operators are in :mod:`quantrain.pruning`.
"""

from .calibrated import sparsegpt, wanda
from .cuts import Removal, cut_optimizer
from .masks import load_masks, magnitude, masks_of, remove_masks
from .pruner import KeptPruned, Pruner, keep_pruned
from .report import SparsityTable, sparsity
from .schedule import ConstantSchedule, CubicSchedule, SpecSchedule
from .structured import remove_channels, remove_ffn_rows, remove_heads, remove_layers

__all__ = [
    "ConstantSchedule",
    "CubicSchedule",
    "KeptPruned",
    "Pruner",
    "Removal",
    "SpecSchedule",
    "SparsityTable",
    "cut_optimizer",
    "keep_pruned",
    "load_masks",
    "magnitude",
    "masks_of",
    "remove_channels",
    "remove_ffn_rows",
    "remove_heads",
    "remove_layers",
    "remove_masks",
    "sparsegpt",
    "sparsity",
    "wanda",
]
