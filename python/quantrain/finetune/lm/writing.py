"""What a fine-tuned adapter leaves: the adapter as PEFT reads it, and the merged model as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantrain import nn as qnn
from quantrain.finetune.lm.models import LanguageModel

MERGED_DTYPE = torch.bfloat16


def write_adapter(folder: Path, model: Any, lm: LanguageModel) -> None:
    """Write the adapter of a prepared model in PEFT's format, which names ``lm.source`` as its base model."""
    adapter = qnn.lora_adapter(model)
    adapter.base_model = lm.source
    adapter.task_type = "CAUSAL_LM"
    folder.mkdir(parents=True, exist_ok=True)
    qnn.save_lora_adapter(folder, adapter)


def write_merged(folder: Path, model: Any, lm: LanguageModel) -> tuple[Any, list[float]]:
    """Merge the adapter into weights of 16 bits, in place, and write model and tokenizer as transformers reads them.

    Returns:
        The merged model, and of each merged layer what rounding to bfloat16 changed, over the Frobenius norm of the
        adapter's update.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = qnn.merge(model, MERGED_DTYPE)
    errors = [row["update_error"] for row in model.merge_report.rows]
    model = model.to(MERGED_DTYPE)
    model.requires_grad_(True)  # an ordinary model again
    model.save_pretrained(folder, max_shard_size="1TB")  # one file, whatever its size
    lm.tokenizer.save_pretrained(folder)
    return model, [error for error in errors if error is not None]
