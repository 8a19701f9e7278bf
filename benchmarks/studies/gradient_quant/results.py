"""The committed results of the study: the newest file of each part, and means over seeds."""

from __future__ import annotations

import json
from pathlib import Path

QUANTIZERS = ("per_tensor", "per_sample", "per_sample, zero kept", "householder")
KINDS = {"ptq": "per_tensor", "psq": "per_sample", "bhq": "householder"}
MODELS = {"resnet20": "ResNet-20, CIFAR-10-JPEG", "gpt": "GPT, 4 layers, tinyshakespeare"}


def newest(folder: Path, part: str) -> tuple[Path, dict] | None:
    """(path, content) of the newest result of a part; one of a GPU goes before one of a CPU."""
    paths = sorted(folder.glob(f"gradient-quant-{part}-*.json"), key=lambda p: ("-cpu-" not in p.name, p.stem[-10:]))
    if not paths:
        return None
    return paths[-1], json.loads(paths[-1].read_text(encoding="utf-8"))


def measure_of(result: dict) -> str:
    """What a number measures, in the words of the page (older results say "nats a byte")."""
    return result["measure"].replace(" a byte", " per byte")


def by_recipe(rows: list[dict], model: str) -> dict[str, list[float]]:
    """What each recipe reached, one value per seed, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if model in row:
            found.setdefault(row["recipe"], []).append(row[model]["value"])
    return found
