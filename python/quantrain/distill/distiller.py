"""Distillation: a student trained on what a teacher gives (Hinton et al., arXiv:1503.02531).

    L = task_weight task + kl_weight T^2 KL(softmax(t / T) || softmax(s / T)) + sum of weight hidden

s, t: logits of student and teacher; KL the mean over rows (tokens of a language model) that count; hidden: a loss of
two hidden states (FitNets, arXiv:1412.6550; TinyBERT, arXiv:1909.10351; DistilBERT, arXiv:1910.01108).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantrain._arguments import is_number
from quantrain.distillation import distillation_kl, distillation_kl_topk
from quantrain.nn.calibrate import evaluating, run_batch
from quantrain.nn.prepare import check_model

from .hidden import HiddenLosses, wanted
from .hooks import Capture, unwrapped
from .offline import TopkOutput, TopkTeacher
from .outputs import (
    CalledAs,
    attention_mask_of,
    fitted_mask,
    is_causal,
    is_encoder_decoder,
    label_mask,
    labels_of,
    logits_of,
    moved,
    readable,
    without_labels,
)
from .pairs import MatchedPair, Pair, check_weight, matched_pairs
from .projections import Projections, process_group_of, reshard

__all__ = ["DistillationLoss", "Distiller"]

kTemperature = 2.0  # DistilBERT's


class DistillationLoss(dict):
    """The losses of one batch, scalars with their graph: ``"loss"`` is the weighted sum, the others stand unweighted:
    ``"task"``, ``"kl"``, and for each pair of modules e.g. ``"mse:encoder.layer.0"``.

    Attributes:
        output: what the student gave, where the distiller called it.
    """

    output: Any = None

    def backward(self) -> None:
        """Of the sum."""
        self["loss"].backward()

    def floats(self) -> dict[str, float]:
        """All of them as numbers, read from the device at once.

        >>> DistillationLoss(loss=torch.tensor(3.0), kl=torch.tensor(1.5)).floats()
        {'loss': 3.0, 'kl': 1.5}
        """
        values = torch.stack([value.detach().double() for value in self.values()]).tolist()
        return dict(zip(self, values, strict=True))


class Distiller:
    """The losses between a student and a teacher, with what it takes to get at their hidden states.

    Everything it needs is outside of both models: hooks and a teacher in evaluation mode only within ``with`` (or
    :meth:`attach` to :meth:`detach`), projections and their state in the distiller. A student that is copied, pickled
    or saved meanwhile has nothing of it. The teacher is never trained; its modes and ``requires_grad`` are given back,
    also where an error is raised.

    Args:
        student: as it is trained: plain, prepared, in DistributedDataParallel, of fully_shard, compiled by
            torch.compile. Names are those of the module within a wrapper.
        teacher: of any type, device or number of bits; or a :class:`TopkTeacher`, whose outputs were stored.
        pairs: hidden states to compare, ``{"encoder.layer.*": "encoder.layer.*"}`` or a list of :class:`Pair`, which
            says how names match. Maps ``[N, C, H, W]`` are compared with their channels last.
        losses: of all pairs of a mapping, or a mapping from its keys: a loss of :class:`Pair` or ``(loss, weight)``.
        temperature: T; None: 2, or that of the stored teacher.
        kl_weight: of the loss of logits; 0: they are not looked at.
        task_weight: of the task's own loss, where there is one.
        task: ``task(output, batch)``, the task's loss of a call ``distiller(batch)``; by default the student's
            ``output.loss``, where it has one.
        forward: ``forward(model, batch)``; by default as in :func:`quantrain.nn.calibrate`.
        mask: ``mask(batch)``, 0 at rows that do not count, or None; by default the ``attention_mask`` of a mapping (not
            of encoder-decoders, whose mask is of the encoder's tokens).
        logits: ``logits(output)``, where a model's result has them elsewhere than in ``.logits`` or as its first
            tensor.
        causal: whether the label of a row of logits is that of the next place; None: by the class's name (...CausalLM).
        projections: widths ``(student, teacher)`` by key of ``pairs`` (``Pair.student``), for :meth:`parameters` to be
            asked for before a batch is seen; pairs that it leaves out have equal widths. None: seen at the first batch.
        seed: of the projections' weights.
        process_group: over which the projections' gradients are averaged; None: the one of a wrapped student.

    Raises:
        TypeError: no modules.
        ValueError: no loss at all; a temperature that is not positive; pairs that name no module, or whose counts
            cannot be matched; hidden states of a stored teacher; output layers of different vocabularies; a teacher
            that shares trained parameters with the student.

    >>> student, teacher = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> with Distiller(student, teacher, temperature=4.0) as distiller:
    ...     losses = distiller(torch.randn(16, 8))
    >>> losses.backward()
    >>> list(losses), student.weight.grad is not None, teacher[0].weight.grad
    (['loss', 'kl'], True, None)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | TopkTeacher,
        pairs: Mapping[str, str | Sequence[str]] | Sequence[Pair] | None = None,
        losses: Any = "mse",
        *,
        temperature: float | None = None,
        kl_weight: float = 1.0,
        task_weight: float = 1.0,
        task: Callable[[Any, Any], Tensor] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        causal: bool | None = None,
        projections: Mapping[str, tuple[int, int]] | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ):
        check_model("Distiller", student)
        if not isinstance(teacher, TopkTeacher):
            check_model("Distiller", teacher)
        self.temperature = _temperature(temperature, teacher)
        for name, value in (("kl_weight", kl_weight), ("task_weight", task_weight)):
            check_weight(name, value)
        self.pairs = _pairs(student, teacher, pairs, losses)
        if not self.pairs and kl_weight == 0:
            raise ValueError(
                "Distiller: expected a loss between student and teacher, got no pairs (of weight above 0) and "
                "kl_weight=0"
            )
        if kl_weight and logits is None:
            _check_vocabularies(student, teacher)
        _check_apart(student, teacher)
        self.student, self.teacher = student, teacher
        self.kl_weight, self.task_weight, self.task = float(kl_weight), float(task_weight), task
        self.forward, self.mask, self.logits = forward, mask or _default_mask(unwrapped(student)), logits
        self.causal = is_causal(unwrapped(student)) if causal is None else causal
        self._student = Capture(student, wanted(self.pairs, "student"), whose="student", trains=True)
        self._teacher = None
        if isinstance(teacher, nn.Module):
            self._teacher = Capture(teacher, wanted(self.pairs, "teacher"), whose="teacher", trains=False)
        self._projections = Projections(seed, process_group or process_group_of(student))
        self._hidden = HiddenLosses(self.pairs, self._projections, projections)
        self._attached: ExitStack | None = None

    def __enter__(self) -> Distiller:
        self.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()

    def attach(self) -> None:
        """Registers the hooks, and sets the teacher to evaluation without gradients, as ``with`` does.

        Raises:
            RuntimeError: attached already.
        """
        if self._attached is not None:
            raise RuntimeError("Distiller: expected it detached before attach(), got it attached")
        with ExitStack() as stack:
            if self._teacher is not None:
                stack.enter_context(_untrained(self.teacher))
                self._teacher.attach(stack)
            self._student.attach(stack)
            self._attached = stack.pop_all()

    def detach(self) -> None:
        """Undoes :meth:`attach`; nothing where it is detached."""
        if self._attached is not None:
            attached, self._attached = self._attached, None
            attached.close()

    def __call__(self, batch: Any = None, *, index: int | None = None, **inputs: Any) -> DistillationLoss:
        """Runs teacher and student on a batch, and gives their losses.

        Works outside of ``with`` too, which then holds for this call. Without gradients (``torch.no_grad``) it
        measures. Labels of a mapping reach the student where ``task_weight`` is not 0, and the teacher only if it is an
        encoder-decoder. Which rows count: those of the mask and, for logits, with a label other than -100.

        Args:
            batch: as :func:`quantrain.nn.calibrate` takes it, on the student's device.
            index: of the batch in a stored teacher; None: found by its digest.
            inputs: in place of a mapping, as transformers' models are called: ``distiller(**batch)``.
        """
        if (batch is None) != bool(inputs):
            raise TypeError(
                f"Distiller: expected a batch, or its parts as keywords, got {'both' if inputs else 'neither'}"
            )
        batch = inputs if batch is None else batch
        with ExitStack() as stack:
            if self._attached is None:
                self.attach()
                stack.callback(self.detach)
            taught = self.teach(batch, index=index)
            own = batch if self.task_weight and self.task is None else without_labels(batch, unwrapped(self.student))
            self._student.every_pass = not torch.is_grad_enabled()
            try:
                output = (self.forward or run_batch)(self._called(self.student), own)
            finally:
                self._student.every_pass = False
            task_loss = None
            if self.task_weight:
                task_loss = getattr(output, "loss", None) if self.task is None else self.task(output, batch)
            losses = self.loss(output, taught, task_loss, self.mask(batch), labels=labels_of(batch))
        losses.output = output
        return losses

    def teach(self, batch: Any, *, index: int | None = None) -> Any:
        """The teacher's result for a batch, without gradients; its hidden states are kept for :meth:`loss`."""
        if self._teacher is None:
            return self.teacher.find(batch) if index is None else self.teacher[index]
        if index is not None:
            raise ValueError(f"Distiller: expected an index with a stored teacher alone, got {index}")
        if self._attached is None:
            raise RuntimeError("Distiller: expected attach() or `with` before teach(), got it detached")
        batch = moved(without_labels(batch, unwrapped(self.teacher)), self.teacher)
        with torch.no_grad(), _plain_attention():
            return (self.forward or run_batch)(self._called(self.teacher), batch)

    def loss(
        self,
        student_output: Any,
        teacher_output: Any = None,
        task_loss: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> DistillationLoss:
        """The losses of the last forward passes of both models, whose hidden states are forgotten then.

        Args:
            student_output: logits ``[.., V]`` or what has them (``.logits``, a mapping, a tuple).
            teacher_output: the same of the teacher (from :meth:`teach`, or a call without gradients), or a
                :class:`TopkOutput`. Neither is read where ``kl_weight`` is 0.
            task_loss: the task's own loss, a scalar.
            mask: nonzero where a row counts: ``[B, T]`` of tokens, ``[B]`` of samples. For a classifier's logits
                ``[B, V]``, which have no tokens, a mask of tokens says nothing.
            labels: logits of rows whose label is -100 do not count; those of a causal model are one place ahead.

        Raises:
            ValueError: other vocabularies or rows than the teacher's; a mask of another shape; modules that were not
                called since the last loss, or whose results were written in place.
            RuntimeError: pairs of modules, and no hooks: outside of ``with``.
        """
        if self.pairs and self._attached is None:
            raise RuntimeError("Distiller: expected attach() or `with` around the forward passes, got it detached")
        taken = self._student.take(), self._teacher.take() if self._teacher is not None else {}
        parts, weights = {}, {pair.label: pair.weight for pair in self.pairs}
        if task_loss is not None and self.task_weight:
            parts["task"], weights["task"] = task_loss, self.task_weight
        if self.kl_weight:
            parts["kl"], weights["kl"] = self._kl(student_output, teacher_output, mask, labels), self.kl_weight
        parts |= self._hidden(*taken, mask)
        device = next(iter(parts.values())).device  # of a student on several devices the first loss's
        parts = {name: part.to(device) for name, part in parts.items()}
        first, *others = (weights[name] * part for name, part in parts.items())
        return DistillationLoss(loss=sum(others, start=first), **parts)

    def build(self, batch: Any) -> None:
        """Makes the projections from one batch, in evaluation mode and without gradients; nothing else changes."""
        with evaluating(self.student), torch.no_grad():
            self(batch)
        reshard(self.student)

    def parameters(self) -> list[nn.Parameter]:
        """The projections', to be trained beside the student's.

        Raises:
            RuntimeError: the widths are not known yet.
        """
        if not self._hidden.widths_known:
            raise RuntimeError(
                "Distiller: expected the widths of hidden states to be known, got no batch yet (call build(batch) "
                "before parameters(), or give projections={...})"
            )
        return list(self._projections.parameters())

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """``student's name->teacher's name`` -> the projection, of pairs whose widths differ."""
        return dict(self._projections.layers)

    def state_dict(self) -> dict[str, Tensor]:
        """The projections' weights: all that a distiller has to be resumed with."""
        return self._projections.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave, in place.

        Raises:
            ValueError: projections of other pairs, or of other widths; nothing is changed then.
        """
        self._projections.load_state_dict(state, {pair.projection for pair in self.pairs})
        self._hidden.widths_known = True

    def _called(self, model: nn.Module) -> Any:
        inner = unwrapped(model)
        return model if inner is model or self.forward is not None else CalledAs(model, inner)

    def _kl(self, student_output: Any, teacher_output: Any, mask: Tensor | None, labels: Any) -> Tensor:
        student = logits_of(student_output, "student", self.logits)
        rows = student.shape[:-1]
        counts = fitted_mask(mask, rows, "the rows of logits")
        labelled = label_mask(labels, rows, self.causal)
        if labelled is not None:
            labelled = labelled.to(student.device)
            counts = labelled if counts is None else labelled & counts.to(student.device).ne(0)
        if counts is not None:
            counts = counts.to(student.device)
        options = {"temperature": self.temperature, "mask": counts}
        if isinstance(teacher_output, TopkOutput):
            teacher_output.check(self.temperature, student.shape)
            stored = (readable(t, student.device) for t in (teacher_output.values, teacher_output.indices))
            return distillation_kl_topk(student, *stored, **options)
        teacher = readable(logits_of(teacher_output, "teacher", self.logits), student.device)
        _check_logits(student, teacher)
        return distillation_kl(student, teacher, **options)


def _temperature(given: float | None, teacher: nn.Module | TopkTeacher) -> float:
    stored = teacher.temperature if isinstance(teacher, TopkTeacher) else None
    if given is None:
        return kTemperature if stored is None else stored
    if not is_number(given) or not math.isfinite(given) or given <= 0:
        raise ValueError(f"Distiller: expected a finite temperature above 0, got {given!r}")
    if stored is not None and given != stored:
        raise ValueError(
            f"Distiller: expected the temperature of the stored teacher, {stored}, whose probabilities are of that "
            f"alone, got {given}"
        )
    return float(given)


def _pairs(student: nn.Module, teacher: nn.Module | TopkTeacher, pairs: Any, losses: Any) -> list[MatchedPair]:
    if not pairs:
        if losses != "mse":
            raise ValueError(f"Distiller: expected pairs beside losses, got losses={losses!r} alone")
        return []
    if isinstance(teacher, TopkTeacher):
        raise ValueError(f"Distiller: expected no pairs with a stored teacher, which has logits alone, got {pairs!r}")
    return matched_pairs(unwrapped(student), unwrapped(teacher), pairs, losses)


def _default_mask(student: nn.Module) -> Callable[[Any], Tensor | None]:
    return (lambda batch: None) if is_encoder_decoder(student) else attention_mask_of


def _check_vocabularies(student: nn.Module, teacher: nn.Module | TopkTeacher) -> None:
    """Those of output layers, where models of transformers say which these are; logits are compared at each loss."""
    sizes = []
    for model in (student, teacher):
        head = None
        if isinstance(model, nn.Module) and callable(find := getattr(unwrapped(model), "get_output_embeddings", None)):
            head = getattr(find(), "out_features", None)
        sizes.append(head if isinstance(model, nn.Module) else model.vocabulary)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(_other_vocabulary(*sizes))


def _other_vocabulary(student: int, teacher: int) -> str:
    return (
        f"Distiller: expected student and teacher of one vocabulary, got logits of {student} and {teacher} classes "
        "(logits=... can cut padding off)"
    )


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(_other_vocabulary(student.shape[-1], teacher.shape[-1]))
    if student.shape != teacher.shape:
        raise ValueError(
            f"Distiller: expected logits of the same rows from both models, got {list(student.shape)} of the student "
            f"and {list(teacher.shape)} of the teacher"
        )


def _check_apart(student: nn.Module, teacher: nn.Module | TopkTeacher) -> None:
    """A teacher does not train, so neither would what it shares."""
    if not isinstance(teacher, nn.Module):
        return
    theirs = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in unwrapped(student).named_parameters():
        if id(parameter) in theirs and parameter.requires_grad:
            raise ValueError(
                f"Distiller: expected a teacher of its own, got one that shares {name!r}, which trains, with the "
                "student (prepare(model, recipe, inplace=False) copies)"
            )


@contextmanager
def _untrained(teacher: nn.Module) -> Iterator[None]:
    """The teacher in evaluation mode and without gradients; afterwards as it was."""
    trained = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    with evaluating(teacher):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.TransformerEncoder's inference path gives nested tensors, and does not call the modules within its layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
