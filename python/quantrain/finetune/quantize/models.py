"""The models of the commands: those in floating point, and the folders that ``quantrain quantize`` writes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from quantrain import nn as qnn
from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.quantize.classifier import CLASSIFIER
from quantrain.finetune.quantize.language import LANGUAGE
from quantrain.finetune.quantize.task import TextTask
from quantrain.finetune.rehearsal import reason_of

FACTS, WEIGHTS = "quantrain.json", "model.safetensors"
VERSION = 1  # of FACTS
TARGET = "quantrain"  # of the folders that this package itself reads
PLAIN = "transformers"  # of those that quantrain prune writes: in floating point, as any other model's


def task_of(name: str, what: str = "MODEL") -> TextTask:
    """The task of the model that ``name`` means, by the architectures in its config.json; of what has none, a language
    model's, whose loading says what is wrong.

    Args:
        name: As load_language_model takes it, or the folder of a classifier.
        what: The argument of the command line that errors name.

    Raises:
        ValueError: The model is of another kind.
    """
    architectures = _architectures(Path(name) / "config.json")
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return CLASSIFIER
    if architectures and not any(_is_causal(architecture) for architecture in architectures):
        raise ValueError(
            f"{what}: expected {LANGUAGE.what} (...ForCausalLM) or {CLASSIFIER.what} (...ForSequenceClassification), "
            f"got {', '.join(architectures)} in {name}"
        )
    return LANGUAGE


def _architectures(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _is_causal(architecture: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return architecture.endswith("ForCausalLM") or architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def load_float(name: str, task: TextTask, what: str = "MODEL") -> LanguageModel:
    """The floating-point model that ``name`` means, in float32 on the CPU.

    Args:
        name: As ``task.load`` takes it.
        task: That of the model.
        what: The argument of the command line that errors name.

    Raises:
        FileNotFoundError, ValueError: As ``task.load``; also a folder of quantized weights.
    """
    if _is_quantized(Path(name)):
        raise ValueError(f"{what}: expected a model in floating point, got {name}, which quantrain quantize wrote")
    try:
        return task.load(name)
    except (ValueError, OSError, RuntimeError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(str(error).replace("--model", what, 1)) from error


def load_any(name: str, task: TextTask, what: str = "MODEL") -> LanguageModel:
    """The model that ``name`` means, in floating point or quantized, on the CPU; arguments and errors as load_float."""
    return load_quantized(Path(name), task) if _is_quantized(Path(name)) else load_float(name, task, what)


def _is_quantized(folder: Path) -> bool:
    """Whether ``quantrain quantize`` wrote ``folder``; a damaged quantrain.json counts as its, and reading it says so."""
    path = folder / FACTS
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("target") != PLAIN
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


def load_quantized(folder: Path, task: TextTask) -> LanguageModel:
    """The model in a folder that ``quantrain quantize --target quantrain`` wrote, on the CPU.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        ValueError: The folder was written for another program, or its files do not fit each other.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    facts = read_facts(folder)
    if facts["target"] != TARGET:
        raise ValueError(
            f"{folder}: expected a folder written with --target {TARGET}, got one for {facts['target']}, which that "
            "program reads"
        )
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: expected a file {WEIGHTS}, got none")
    logging.disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        with _without_initialization():
            model = getattr(transformers, task.auto_class).from_config(config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many types for a folder that it cannot read
        reason = next((line for line in reason_of(error).splitlines() if line.strip()), "no message")
        raise ValueError(
            f"{folder}: expected config.json and tokenizer.json of the model, got {reason[:300]}"
        ) from error
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # they are read next, and prepare may look at them before
    model = qnn.from_checkpoint(folder / WEIGHTS, model.eval())
    return LanguageModel(model, tokenizer, facts["title"], str(folder))


def read_facts(folder: Path) -> dict[str, Any]:
    """What quantrain.json of ``folder`` says.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(facts[key], str) for key in ("title", "target")):
            raise ValueError("a title or a target that is no text")
        if facts.get("version") != VERSION:
            raise ValueError(f"version {facts.get('version')!r} in place of {VERSION}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: expected what quantrain quantize writes, got {reason_of(error)}") from error
    return facts


def _without_initialization() -> AbstractContextManager[None]:
    """Where transformers does not draw weights; nothing changes where this release of it has no such place."""
    for module in ("initialization", "modeling_utils"):  # of release 5, of release 4
        try:
            found = __import__(f"transformers.{module}", fromlist=["no_init_weights"])
            return found.no_init_weights()
        except (ImportError, AttributeError):
            continue
    return nullcontext()
