"""The folder that ``quantrain quantize`` writes: made beside its place, then renamed, so that it is there whole or not
at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantrain.finetune.lm.models import LanguageModel
from quantrain.finetune.quantize.models import FACTS

# What a model's folder holds beside its weights.
_BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


def check_output(folder: Path, force: bool) -> None:
    """Make sure that ``folder`` may be written.

    Raises:
        FileExistsError: Something is there that would be lost: without ``force`` a folder with files, with it one that
            this command did not write.
        PermissionError: Its parent cannot be written to.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"--output: expected a folder, got {folder}, which is a file or a link")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise FileExistsError(
                f"--output: expected a folder that is new or empty, got {folder}, which has files; --force replaces it"
            )
        if not (folder / FACTS).is_file():
            raise FileExistsError(
                f"--output: expected with --force a folder that quantrain quantize wrote, got {folder}, which has "
                f"files and no {FACTS}"
            )
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"--output: expected a place that can be written to, got {parent}")


@contextmanager
def new_folder(folder: Path, force: bool) -> Iterator[Path]:
    """An empty folder beside ``folder``, which takes its place at the end of the block, or goes where that fails.

    Raises:
        FileExistsError, PermissionError: As check_output.
    """
    check_output(folder, force)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield made
        umask = os.umask(0)
        os.umask(umask)
        made.chmod(0o777 & ~umask)  # mkdtemp's are for their owner alone
        check_output(folder, force)
        if folder.exists():
            _replace(folder, made)
        else:
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace(folder: Path, made: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        folder.rename(aside)
        try:
            made.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_beside_weights(folder: Path, lm: LanguageModel) -> None:
    """Write what a model's folder holds beside its weights: as the source has it where that is a folder."""
    source = Path(lm.source)
    if source.is_dir():
        for path in {path for pattern in _BESIDE_WEIGHTS for path in source.glob(pattern) if path.is_file()}:
            shutil.copyfile(path, folder / path.name)
        return
    lm.model.config.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    if getattr(lm.model, "generation_config", None) is not None:
        lm.model.generation_config.save_pretrained(folder)


def untie(folder: Path) -> None:
    """Let the model in ``folder`` have a head of its own, as a rotated one has."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"tie_word_embeddings": False}, indent=2) + "\n", encoding="utf-8")
