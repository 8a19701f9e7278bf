"""Part `weights`: what 4-bit weights of the blocks' linear layers cost SmolLM2 on WikiText-2.

The first 2,048 tokens of the test text as 4 windows of 512, 511 predictions each, in float32. KL: the mean over positions of
KL(float || quantized), nats. top-1: share of positions where both have the same most likely token.
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.smollm2 import compared, ids_of, log_probabilities, model_name, moved_model
from torch import Tensor, nn

import quantrain.nn as qnn
from quantrain import Recipe


@dataclass(frozen=True)
class Settings:
    windows: int = 4
    length: int = 512

    def facts(self) -> dict:
        return asdict(self)


SETTINGS, QUICK = Settings(), Settings(windows=2, length=64)


def recipes() -> dict[str, Recipe]:
    named = {name: qnn.as_recipe(name) for name in ("nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine", "w8a16")}
    blocks = {f"int4-g{size}": {"weight": {"group_size": size}} for size in (64, 32)}
    signed = {
        f"int4-g{size}, signed": {"weight": {"group_size": size}, "scheme": {"scale_rule": "signed"}}
        for size in (128, 32)
    }
    changed = {name: qnn.changed_recipe(named["int4-g128"], change) for name, change in (blocks | signed).items()}
    searched = {
        f"{name}, search": qnn.changed_recipe(recipe, {"scheme": {"scale_rule": "search"}})
        for name, recipe in (named | changed).items()
        if name in ("nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64", "int4-g32")
    }
    return named | changed | searched


def packed(model: nn.Module) -> int:
    """Bytes of the packed layers."""
    kinds = (qnn.FourBitLayer, qnn.QuantizedLayer)
    return sum(t.numel() * t.element_size() for m in model.modules() if isinstance(m, kinds) for t in m.buffers())


def run(settings: Settings, options, save: Callable[[dict], None]) -> int:
    name = model_name(options)
    device = options.device
    ids = ids_of(name, "wikitext-2", "test.txt", characters=40 * settings.windows * settings.length)
    ids = ids[: settings.windows * settings.length].view(settings.windows, settings.length).to(device)
    exact = log_probabilities(moved_model(name).to(device), ids)
    rows: list[dict] = []

    def add(row: dict) -> None:
        rows.append(row)
        save(row)
        bits = f"{row['bits']:.3f}" if "bits" in row else "-"
        print(
            f"{row['weights']:<22} {bits:>6} bits  perplexity {row['perplexity']:8.4f}  KL {row['kl']:.5f}  top-1 {row['top1']:.4f}",
            flush=True,
        )

    add({"weights": "float32", **compared(exact, exact, ids)})
    for title, recipe in recipes().items():
        model = moved_model(name)
        head = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) or n == "lm_head"]
        qnn.prepare(model, recipe, skip=head if recipe.scheme is None else ())
        qnn.convert(model).to(device)
        size = packed(model)
        elements = sum(math.prod(m.weight_shape) for m in model.modules() if isinstance(m, qnn.QuantizedLayer))
        add({"weights": title, "bits": 8 * size / elements, **compared(log_probabilities(model, ids), exact, ids)})
    return compare_languages(name, options, ids.cpu(), rows, save) if options.cpp else 0


def compare_languages(name: str, options, ids: Tensor, rows: list[dict], save: Callable[[dict], None]) -> int:
    """evaluate_llama on the same weights and ids. Returns how many of its figures are further off than rounding takes them."""
    with tempfile.TemporaryDirectory() as folder:
        moved_model(name).save_pretrained(folder)
        path = Path(folder) / "ids.bin"
        path.write_bytes(ids.flatten().to(torch.int32).numpy().tobytes())
        names = ["float", "nf4", "nf4-dq", "fp4", "int4-g128", "int4-g64-affine"]
        log = Path(folder) / "log.jsonl"
        command = [options.cpp / "evaluate_llama", "--model", folder, "--ids", path, "--recipe", ",".join(names)]
        command += ["--against", "float", "--length", ids.shape[1], "--log", log]
        subprocess.run([str(word) for word in command], check=True)
        found = [json.loads(line) for line in log.read_text().splitlines()]
    failed = 0
    mine = {row["weights"]: row for row in rows}
    for row in found:
        other = mine["float32" if row["recipe"] == "float" else row["recipe"]]
        off = abs(row["perplexity"] / other["perplexity"] - 1)
        failed += off > 1e-4
        save({"weights": f"{row['recipe']}, C++", "perplexity": row["perplexity"], "kl": row.get("kl"), "off": off})
        print(f"{row['recipe']:<22} in C++: perplexity {row['perplexity']:.4f}, {off:.1e} off", flush=True)
    return failed
