"""What each finished stage of a run measured, kept in results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantrain._C import replace_file

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LayerError:
    """How far a layer's quantized tensor lies from the float one.

    Attributes:
        layer: The layer's name.
        tensor: ``"weight"``, ``"input"`` or ``"output"`` (the layer's result, both errors together).
        sqnr_db: Signal to quantization noise ratio in dB.
        saturation_pct: Percent of the elements whose code lies outside the grid; None for an output.
    """

    layer: str
    tensor: str
    sqnr_db: float
    saturation_pct: float | None


@dataclass(frozen=True)
class AuditRow:
    """One operation of an integer-only network.

    Attributes:
        name: The node's name.
        op: The kind of layer.
        operations: What it computes with: products, additions, shifts, comparisons, copies.
        operands: Widths of what it takes, such as ``"uint8 x int8"``.
        accumulator: Width of its sums, or None.
        result: Width of what it gives.
        bound: The largest magnitude that its sums can have, or None.
    """

    name: str
    op: str
    operations: str
    operands: str
    accumulator: str | None
    result: str
    bound: int | None


@dataclass(frozen=True)
class StageResult:
    """One row of the table.

    Attributes:
        stage: ``"float32"`` or the recipe's name.
        accuracy: On the test set, 0 to 1; of a recipe, that of the converted model.
        loss: Mean cross-entropy there.
        weight_bytes: Size of the stage's checkpoint file (of a recipe, the converted one's).
        peak_memory_bytes: Largest resident memory of the process during the stage (on a GPU, allocated memory).
        steps: Training steps taken.
        step_seconds: Median time of one; None without training.
        seconds: Wall time of the stage.
        convert_difference: Largest difference of a logit between the fake-quantized and the converted model on one
            batch; None for the baseline.
        layer_errors: Per layer and tensor, of the fake-quantized model on one training batch.
        latency_seconds: Median time of the model for one test sample; None where it was not measured.
        audit: The operations of a converted model that is integer-only (recipes in fixed point); empty for others.
    """

    stage: str
    accuracy: float
    loss: float
    weight_bytes: int
    peak_memory_bytes: int
    steps: int
    step_seconds: float | None
    seconds: float
    convert_difference: float | None = None
    layer_errors: tuple[LayerError, ...] = field(default=())
    audit: tuple[AuditRow, ...] = field(default=())
    latency_seconds: float | None = None

    @classmethod
    def from_entry(cls, entry: dict) -> Self:
        """The result that ``asdict`` made ``entry`` of."""
        errors = tuple(LayerError(**error) for error in entry["layer_errors"])
        audit = tuple(AuditRow(**row) for row in entry.get("audit", []))
        return cls(**{**entry, "layer_errors": errors, "audit": audit})


@dataclass(frozen=True)
class FailedStage:
    """A stage that ended in an error; a second run tries it again.

    Attributes:
        stage: The recipe's name.
        failed: Why.
        seconds: Wall time until then.
    """

    stage: str
    failed: str
    seconds: float


Result = TypeVar("Result")  # StageResult, or what another job measures


def read_results(folder: Path, kind: type[Result] = StageResult) -> dict[str, Result]:
    """The finished stages by name, in the order they finished; failed ones are left out.

    Raises:
        ValueError: results.json is not what write_results writes of results of that kind.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        results = [kind.from_entry(entry) for entry in entries if "failed" not in entry]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the results of an earlier run, got {error}") from error
    return {result.stage: result for result in results}


def write_results(folder: Path, results: Iterable[object]) -> None:
    """Write results.json, the results and FailedStages, whole or not at all."""
    write_json(folder / "results.json", [asdict(result) for result in results])


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    replace_file(os.fspath(path), (json.dumps(content, indent=2) + "\n").encode())
