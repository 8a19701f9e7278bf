"""Files that the tests of ``quantrain quantize`` and ``quantrain evaluate`` share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def fox_text(tmp_path_factory) -> Path:
    """A text of some thousand bytes."""
    from samples.quantize_command import SENTENCE

    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("".join(SENTENCE.format(number) for number in range(40)))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A folder of transformers with the tiny Llama in several files."""
    from quantrain.finetune.lm import models

    folder = tmp_path_factory.mktemp("saved") / "tiny"
    lm = models.load_language_model(models.TINY)
    lm.model.save_pretrained(folder, max_shard_size="200KB")
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized_llama(tmp_path_factory, fox_text) -> SimpleNamespace:
    """``folder``: what a run wrote; ``model``: what it wrote there, still in memory; ``logits``: that model's, of the
    held-out windows."""
    from samples.quantize_command import held_out_windows, kept_models, logits, words

    from quantrain.finetune.cli import main
    from quantrain.finetune.quantize.language import LANGUAGE

    folder = tmp_path_factory.mktemp("out") / "tiny-w4"
    with pytest.MonkeyPatch.context() as patch:
        kept = kept_models(patch)
        assert main(words(fox_text, folder)) == 0
    (model,) = kept
    return SimpleNamespace(folder=folder, model=model, logits=logits(LANGUAGE, model, held_out_windows(fox_text)))
