"""Distillation: a student trained on what a teacher gives.

:class:`Distiller` has the losses and gets at hidden states, :func:`distill` is a training loop in one call,
:func:`write_topk` stores a teacher's answers, :func:`shallow_student` makes a student of fewer layers. The losses as
operators are in :mod:`quantrain.distillation`. :func:`quantrain.ptq.distill_layers` is the special case of a student
each of whose layers gets the teacher's input.
"""

from quantrain.ptq import LayerDistillation, distill_layers

from .distiller import DistillationLoss, Distiller
from .offline import TopkOutput, TopkTeacher, write_topk
from .pairs import Pair
from .shallow import LayerImportance, layer_importance, shallow_student
from .training import Distillation, distill

__all__ = [
    "Distillation",
    "DistillationLoss",
    "Distiller",
    "LayerDistillation",
    "LayerImportance",
    "Pair",
    "TopkOutput",
    "TopkTeacher",
    "distill",
    "distill_layers",
    "layer_importance",
    "shallow_student",
    "write_topk",
]
