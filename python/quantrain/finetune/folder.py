"""The folder of a run: which files in it are the run's own, recorded before they are written, so that no other is
replaced or deleted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from quantrain.finetune.results import read_results, write_json

BASELINE = "float32"
MANIFEST = "files.json"
RUN_FILES = (
    "config.json",
    "results.json",
    "metrics.jsonl",
    "report.html",
    "table.txt",
    "plots/curves.png",
    "plots/sizes.png",
    "plots/sqnr.png",
)
LONGEST_NAME = 200  # file systems take 255, and endings are added
SUBFOLDERS = ("plots", "state", "tensorboard")
MODEL_FOLDERS = ("adapter", "merged")  # of a stage, in a folder of the stage's name


def check_name(name: str, what: str) -> str:
    """``name`` where it names one entry of a folder, that is, has no separator and is not ``.`` or ``..``.

    Raises:
        ValueError: It is anything else; the message begins with ``what``.

    Example:
        >>> check_name("resnet20-digits", "--name")
        'resnet20-digits'
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{what}: expected a name without / and \\ that is not empty, '.' or '..', got {name!r}")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"{what}: expected a name of at most {LONGEST_NAME} bytes, got {len(name.encode())}")
    return name


def stage_files(stage: str) -> list[str]:
    """The files that a run may write for ``stage``, relative to its folder."""
    forms = ("", ".prepared", ".trained", ".converted")
    names = [f"{stage}{form}.safetensors" for form in forms]
    names += [f"{stage}.converted.json", f"{stage}.error.txt", f"state/{stage}.pt"]
    return names + [f"plots/{stage}-{kind}.png" for kind in ("weights", "inputs")]


def model_files(stage: str) -> list[str]:
    """The files that a language model's run is known to write for ``stage`` in folders of the stage's own; a tokenizer
    may have more."""
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    merged = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    names = [f"{stage}/adapter/{name}" for name in adapter]
    return names + [f"{stage}/merged/{name}" for name in (*merged, "chat_template.jinja", "special_tokens_map.json")]


class RunFolder:
    """The files of one run, in ``files.json`` of its folder ``path``.

    A run from before there was such a list owns what its config.json and results.json name.

    Raises:
        ValueError: files.json is damaged, or names something outside the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = self._recorded()

    def check(self, names: Iterable[str]) -> None:
        """Make sure that the run may write the files ``names``.

        Raises:
            FileExistsError: One is there that no run recorded.
        """
        for name in names:
            if name not in self.files and (self.path / name).exists():
                raise FileExistsError(
                    f"{self.path / name}: expected no such file or one that a run recorded in {MANIFEST}, got one of "
                    "unknown origin, which the run would replace; take another --name, or move it away"
                )

    def claim(self, names: Iterable[str]) -> None:
        """Record the files ``names`` as the run's own, before they are written; the folder is made where there is
        none."""
        self.files |= set(names)
        for name in ("plots", "state"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_json(self.path / MANIFEST, sorted(self.files))

    def take(self, source: Path, folder: str) -> None:
        """Move the files in ``source`` to ``folder`` in the run's folder, as the run's own.

        Raises:
            FileExistsError: One is there that no run recorded; nothing is moved then.
        """
        paths = [path for path in source.rglob("*") if path.is_file()]
        targets = {path: f"{folder}/{path.relative_to(source).as_posix()}" for path in paths}
        self.check(targets.values())
        self.claim(targets.values())
        for path, name in targets.items():
            target = self._inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def delete(self) -> None:
        """Delete the recorded files, then those of the run's folders that are empty; everything else stays."""
        for name in self.files:
            self._inside(name).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)
        folders = {str(parent) for name in self.files for parent in PurePosixPath(name).parents if parent.parts}
        for name in sorted({*folders, *SUBFOLDERS}, reverse=True):  # what lies in a folder comes before it
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        self.files = set()

    def _inside(self, name: str) -> Path:
        path = self.path / name
        parts = PurePosixPath(name).parts
        known = len(parts) == 1 or (len(parts) == 2 and parts[0] in SUBFOLDERS)
        known |= len(parts) >= 3 and parts[1] in MODEL_FOLDERS
        if not known or ".." in parts or parts[0] == "/":
            raise ValueError(f"{self.path / MANIFEST}: expected names of files in the run's folder, got {name!r}")
        if path.parent.resolve() != self.path.resolve() / path.parent.relative_to(self.path):
            raise ValueError(f"{self.path / MANIFEST}: expected files in the run's folder, got {name!r} behind a link")
        return path

    def _recorded(self) -> set[str]:
        path = self.path / MANIFEST
        if not path.is_file():
            return self._of_older_run()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected the list of a run's files, got {error}") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"{path}: expected the list of a run's files, got {type(found).__name__}")
        for name in found:
            self._inside(name)
        return set(found)

    def _of_older_run(self) -> set[str]:
        path = self.path / "config.json"
        try:
            stages = [BASELINE, *json.loads(path.read_text(encoding="utf-8"))["recipes"]]
        except (OSError, ValueError, TypeError, KeyError):
            return set()
        stages = [stage for stage in dict.fromkeys([*stages, *read_results(self.path)]) if isinstance(stage, str)]
        names = [name for stage in stages for name in stage_files(check_name(stage, str(path)))]
        events = (self.path / "tensorboard").glob("events.out.tfevents.*")  # named by TensorBoard, so not in a list
        return {*RUN_FILES, *names, *(f"tensorboard/{event.name}" for event in events)}
