"""What a stage of a language-model run measured, and the tables made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantrain import nn as qnn
from quantrain.finetune.folder import BASELINE
from quantrain.finetune.lm.task import perplexity
from quantrain.finetune.report import ReportTable
from quantrain.finetune.results import FailedStage
from quantrain.finetune.table import format_bytes, format_seconds

if TYPE_CHECKING:
    from typing_extensions import Self

HEADER = ("model", "perplexity", "untrained", "stored", "weights", "trained", "peak memory", "speed", "total time")
COLUMNS = (
    ("perplexity", "of the held-out tokens after fine-tuning: e to the mean loss, lower is better"),
    ("untrained", "of the quantized model before it was fine-tuned"),
    ("stored", "of the model as written: the adapter merged into weights of 16 bits, or converted to integers"),
    ("weights", "bytes of all weights while the model is fine-tuned"),
    ("trained", "parameters that are fine-tuned"),
    ("peak memory", "most memory that the process held while this model was made (on a GPU: allocated there)"),
    ("speed", "tokens of a training step in a second (median)"),
    ("total time", "time for making and testing this model"),
)
_MEMORY_HEADER = ("model", "packed weights", "other weights", "trained weights", "their gradients", "optimizer", "peak")


@dataclass(frozen=True)
class Memory:
    """Bytes of a model in training.

    Attributes:
        packed: Weights stored in 4 bits, with their scales.
        frozen: Everything else that is not trained: embeddings, norms, the head, buffers.
        trained: Parameters that are trained; their gradients take as much.
        optimizer: The optimizer's state.
    """

    packed: int
    frozen: int
    trained: int
    optimizer: int = 0

    @staticmethod
    def of(model: nn.Module, optimizer: int = 0) -> Memory:
        """The memory of ``model``, each tensor counted once."""
        trained = {id(value): value for value in model.parameters() if value.requires_grad}
        layers = [module for module in model.modules() if isinstance(module, qnn.FourBitLayer)]
        packed = {id(value): value for layer in layers for value in _tensors(layer) if id(value) not in trained}
        every = {id(value): value for value in _tensors(model)}
        frozen = [value for key, value in every.items() if key not in trained and key not in packed]
        return Memory(_bytes(packed.values()), _bytes(frozen), _bytes(trained.values()), optimizer)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.packed + self.frozen + self.trained


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class LmResult:
    """One row of the table.

    Attributes:
        stage: ``"float32"``, the model before anything is quantized, or the recipe's name.
        loss: Mean cross-entropy of the held-out tokens in nats; None of a baseline that the device has no room for.
        untrained_loss: The same before the fine-tuning; None for the baseline.
        stored_loss: The same of the model as written; None for the baseline.
        memory: Bytes of the model in training.
        trained_parameters: Their number.
        peak_memory_bytes: Largest resident memory of the process during the stage (on a GPU, allocated memory).
        steps: Training steps taken.
        step_seconds: Median time of one; None without training.
        tokens_per_second: Of a training step, the median; None without training.
        seconds: Wall time of the stage.
        update_error: What rounding to 16 bits changed when the adapter was merged, over the norm of its update, the mean
            of the layers: above 1 more than the training had. None where nothing was merged.
    """

    stage: str
    loss: float | None
    memory: Memory
    peak_memory_bytes: int
    seconds: float
    untrained_loss: float | None = None
    stored_loss: float | None = None
    trained_parameters: int = 0
    steps: int = 0
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    update_error: float | None = None

    @property
    def perplexity(self) -> float:
        """Of the held-out tokens; NaN where it was not measured."""
        return float("nan") if self.loss is None else perplexity(self.loss)

    @classmethod
    def from_entry(cls, entry: dict) -> Self:
        """The result that ``asdict`` made ``entry`` of."""
        return cls(**{**entry, "memory": Memory(**entry["memory"])})


def rows(results: Sequence[LmResult | FailedStage], precision: str) -> list[tuple[str, ...]]:
    """The table's cells, one row per stage; the row of a failed stage has two, its name and the reason."""
    return [_row(result, precision) for result in results]


def _row(result: LmResult | FailedStage, precision: str) -> tuple[str, ...]:
    if isinstance(result, FailedStage):
        return (result.stage, f"failed: {result.failed}")
    speed = result.tokens_per_second
    return (
        _name(result.stage, precision),
        perplexity_text(result.loss),
        perplexity_text(result.untrained_loss, ""),
        perplexity_text(result.stored_loss, ""),
        format_bytes(result.memory.weights),
        f"{result.trained_parameters:,}" if result.trained_parameters else "",
        format_bytes(result.peak_memory_bytes),
        "no training" if speed is None else f"{speed:,.0f} tokens/s",
        format_seconds(result.seconds),
    )


def base_name(precision: str) -> str:
    """What the model before anything is quantized is called, in a run of that precision."""
    return f"base ({precision})"


def _name(stage: str, precision: str) -> str:
    return base_name(precision) if stage == BASELINE else stage


def perplexity_text(loss: float | None, missing: str = "-") -> str:
    if loss is None:
        return missing
    value = perplexity(loss)
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e5 else f"{value:.3g}"


def memory_table(results: Sequence[LmResult], precision: str) -> ReportTable:
    """Where the bytes of a training are."""
    lines = []
    for result in results:
        memory = result.memory
        parts = (memory.packed, memory.frozen, memory.trained, memory.trained, memory.optimizer)
        if result.steps == 0:
            parts = (memory.packed, memory.frozen + memory.trained, 0, 0, 0)
        cells = [format_bytes(part) if part else "-" for part in parts]
        lines.append((_name(result.stage, precision), *cells, format_bytes(result.peak_memory_bytes)))
    note = (
        "Packed weights have 4 bits and their scales; other weights are those that are neither packed nor trained: "
        "embeddings, norms, the head. What the peak has beyond these are activations, and on a CPU the program itself."
    )
    return ReportTable(_MEMORY_HEADER, lines, "Memory", note)
