"""Data of the user for the fine-tuning job: folders of images, csv files of numbers, functions that return datasets.

Everything is read into memory once, so a dataset's random transforms are drawn once and not again each epoch.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantrain.finetune.data import Batch, ImageData, LabelledData, pixel_statistics
from quantrain.finetune.models import import_function

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
LARGEST_IMAGE = 2048  # all images are held in memory
TEST_FOLDERS = ("test", "val", "valid", "validation")
_GREY_MODES = ("1", "L", "LA")
_WIDE_MODES = ("I", "F")  # and "I;16" and its kin: Pillow would cut what is above 255


@dataclass(frozen=True)
class FeatureData(LabelledData):
    """A training and a test set of inputs that the model takes as they are, held in memory.

    Attributes:
        train_inputs: ``[N, ...]``.
        test_inputs: ``[M, ...]``.
    """

    train_inputs: Tensor
    test_inputs: Tensor

    _samples = "inputs"

    @property
    def model_arguments(self) -> dict[str, int]:
        """What a model's function is told about the inputs: ``in_features`` of rows, ``in_channels`` of images."""
        size = {2: "in_features", 4: "in_channels"}.get(self.train_inputs.dim())
        return {} if size is None else {size: self.train_inputs.shape[1]}

    def train_batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """The training samples at ``indices``; ``generator`` is not drawn from."""
        return (self.train_inputs[indices],), self.train_labels[indices]

    def skip_train_batch(self, size: int, generator: torch.Generator) -> None:
        """A batch draws nothing, so there is nothing to skip."""

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """The test set in order."""
        for inputs, labels in zip(self.test_inputs.split(batch_size), self.test_labels.split(batch_size), strict=True):
            yield (inputs,), labels


def held_out_rows(count: int, what: str) -> tuple[list[int], list[int]]:
    """Training and test rows of data that has no test set: every tenth row, in the order of a fixed seed, is tested on.

    Raises:
        ValueError: There are fewer than two rows; the message begins with ``what``.
    """
    if count < 2:
        raise ValueError(f"{what}: expected at least two rows, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [row for place, row in enumerate(order) if place % 10], order[::10]


def index_labels(what: str, train: Sequence[str], test: Sequence[str]) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The classes, sorted (numbers by value), and both sets' labels as places among them.

    Raises:
        ValueError: There are fewer than two classes, or the test set has one that the training set lacks.

    Example:
        >>> index_labels("x.csv", ["cat", "dog", "cat"], ["dog"])
        (('cat', 'dog'), tensor([0, 1, 0]), tensor([1]))
    """
    numbers = all(label.isdecimal() for label in train)
    classes = tuple(sorted(set(train), key=int if numbers else str))
    places = {label: place for place, label in enumerate(classes)}
    if len(classes) < 2:
        raise ValueError(f"{what}: expected at least two classes in the training set, got {', '.join(classes)}")
    unknown = sorted(set(test) - set(classes))
    if unknown:
        raise ValueError(f"{what}: expected test labels among the training classes, got {unknown[0]!r}")
    return classes, torch.tensor([places[label] for label in train]), torch.tensor([places[label] for label in test])


# Folders of images


def is_image_folder(folder: Path) -> bool:
    """Whether ``folder`` has subfolders with images, or such folders for training and testing."""
    return folder.is_dir() and any(_images(part) for part in (folder, folder / "train"))


def _images(folder: Path) -> list[Path]:
    """The image files in the subfolders of ``folder``, those of one class after another."""
    found = sorted(folder.glob("*/*")) if folder.is_dir() else []
    return [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]


def load_image_folder(folder: Path, size: int | None = None) -> ImageData:
    """The images in ``folder/<class>/``, or in ``folder/train/<class>/`` and ``folder/test/<class>/`` (or val).

    Where there is no test set, every tenth image is held out. Images are gray where all of them are, else RGB.

    Args:
        folder: The folder.
        size: Images are resized to this many pixels either way; None takes them as they are, all of one size.

    Raises:
        ValueError: A file is no image, sizes differ, the test set has other classes, or ``size`` is above 2048.
        ModuleNotFoundError: The package Pillow is missing.
    """
    if size is not None and size > LARGEST_IMAGE:
        raise ValueError(f"--image-size: expected at most {LARGEST_IMAGE} pixels, got {size}")
    train = _images(folder / "train")
    if train:
        test = next((paths for name in TEST_FOLDERS if (paths := _images(folder / name))), None)
        if test is None:
            raise ValueError(
                f"{folder}: expected images of a test set in test/<class>/ (or val) beside train, got none"
            )
    else:
        paths = _images(folder)
        train, test = ([paths[row] for row in rows] for rows in held_out_rows(len(paths), str(folder)))
    classes, train_labels, test_labels = index_labels(
        str(folder), [path.parent.name for path in train], [path.parent.name for path in test]
    )
    arrays = _read_images([*train, *test], size)
    images = torch.from_numpy(np.stack(arrays)).movedim(-1, 1).contiguous()
    mean, std = pixel_statistics(images[: len(train)])
    return ImageData(
        name=folder.name,
        source=str(folder),
        classes=classes,
        train_labels=train_labels,
        test_labels=test_labels,
        train_images=images[: len(train)],
        test_images=images[len(train) :],
        mean=mean,
        std=std,
        flip=False,
    )


def _read_images(paths: Sequence[Path], size: int | None) -> list[np.ndarray]:
    """uint8 ``[H, W, C]`` of each file, C the same for all."""
    arrays = []
    for path in paths:
        arrays.append(_read_image(path, size))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            first, other = ("x".join(map(str, array.shape[1::-1])) for array in (arrays[0], arrays[-1]))
            raise ValueError(
                f"{path}: expected images of one size, got {other} after {first} of {paths[0]}; "
                "--image-size N resizes them"
            )
    channels = max(array.shape[2] for array in arrays)
    return [np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays]


def _read_image(path: Path, size: int | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(_WIDE_MODES):
                raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
            grey = image.convert("L") if image.mode in _GREY_MODES else image.convert("RGB")
            resized = grey if size is None else grey.resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a readable image, got {error}") from error
    return np.atleast_3d(np.asarray(resized, dtype=np.uint8))


# csv files


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header of a csv file and its rows, each as long as the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no column ``label``, a row of another length, no rows, or is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a csv file with the column label, got none")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a csv file in UTF-8, got {error}") from error
    header = [name.strip() for name in header]
    if header.count("label") != 1:
        raise ValueError(f"{path}: expected one column named label, got the columns {', '.join(header)[:80] or 'none'}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"{path}: expected {len(header)} values in row {number}, got {len(row)}")
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    return header, rows


def load_csv_data(path: Path) -> FeatureData:
    """Rows of numbers and a ``label`` (any text), brought to mean 0 and standard deviation 1 by the training rows.

    ``path`` is one file, of which every tenth row is held out, or a folder with train.csv and test.csv.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not of that form; the message names the row, or the column and what stands there.
    """
    if path.is_dir():
        (header, train), (other, test) = read_csv(path / "train.csv"), read_csv(path / "test.csv")
        if other != header:
            raise ValueError(f"{path / 'test.csv'}: expected the columns of train.csv, got {', '.join(other)[:80]}")
    else:
        header, rows = read_csv(path)
        train, test = ([rows[row] for row in chosen] for chosen in held_out_rows(len(rows), str(path)))
    label = header.index("label")
    classes, train_labels, test_labels = index_labels(
        str(path), [row[label].strip() for row in train], [row[label].strip() for row in test]
    )
    columns = [place for place in range(len(header)) if place != label]
    if not columns:
        raise ValueError(f"{path}: expected columns of numbers beside label, got none")
    inputs = torch.tensor([[_number(path, header, row, place) for place in columns] for row in [*train, *test]])
    mean, std = inputs[: len(train)].mean(0), inputs[: len(train)].std(0, correction=0)
    inputs = ((inputs - mean) / torch.where(std > 0, std, 1.0)).float()
    return FeatureData(
        name=path.stem,
        source=str(path),
        classes=classes,
        train_labels=train_labels,
        test_labels=test_labels,
        train_inputs=inputs[: len(train)],
        test_inputs=inputs[len(train) :],
    )


def _number(path: Path, header: Sequence[str], row: Sequence[str], place: int) -> float:
    try:
        value = float(row[place])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{path}: expected a finite number in the column {header[place]}, got {row[place][:60]!r} "
            "(sentences: --job sst2)"
        )
    return value


# Functions that return datasets


def load_function_data(name: str) -> LabelledData:
    """The datasets that the function ``name`` (``module:function``) returns: ``(train, test)``, each of pairs (input,
    label).

    uint8 tensors ``[C, H, W]`` or ``[H, W]`` and PIL images become images, normalized by the training set's mean and
    standard deviation; every other tensor goes to the model as it is. Labels are whole numbers from 0; a dataset's
    attribute ``classes`` names them.

    Raises:
        ValueError: There is no such function, or it returns something else; the message names the sample.
    """
    function = import_function(name, "--data", "fashion-mnist, digits, a folder, a csv file")
    try:
        returned = function()
        train, test = returned
        sizes = len(train), len(test)
    except Exception as error:
        raise ValueError(
            f"--data: expected {name}() to return a training and a test dataset, got {type(error).__name__}: {error}"
        ) from error
    if not all(sizes):
        raise ValueError(f"--data: expected {name}() to return datasets with samples, got {sizes[0]} and {sizes[1]}")
    train_inputs, train_labels = _collect(name, "training", train)
    test_inputs, test_labels = _collect(name, "test", test)
    if test_inputs.shape[1:] != train_inputs.shape[1:]:
        shapes = [list(inputs.shape[1:]) for inputs in (train_inputs, test_inputs)]
        raise ValueError(f"--data: expected {name} to return test inputs {shapes[0]} as in training, got {shapes[1]}")
    names = getattr(train, "classes", None)
    count = max(int(train_labels.max()), int(test_labels.max())) + 1
    classes = tuple(str(label) for label in (names if names is not None and len(names) >= count else range(count)))
    common = {
        "name": name,
        "source": name,
        "classes": classes,
        "train_labels": train_labels,
        "test_labels": test_labels,
    }
    if train_inputs.dtype == torch.uint8 and train_inputs.dim() in (3, 4):
        if train_inputs.dim() == 3:
            train_inputs, test_inputs = train_inputs.unsqueeze(1), test_inputs.unsqueeze(1)
        mean, std = pixel_statistics(train_inputs)
        return ImageData(**common, train_images=train_inputs, test_images=test_inputs, mean=mean, std=std, flip=False)
    return FeatureData(**common, train_inputs=train_inputs, test_inputs=test_inputs)


def _collect(name: str, what: str, dataset) -> tuple[Tensor, Tensor]:
    """The inputs of a dataset in one tensor, and its labels."""
    inputs, labels = [], []
    for row in range(len(dataset)):
        try:
            sample, label = dataset[row]
            inputs.append(_tensor(sample))
            labels.append(int(label))
            if labels[-1] != label or labels[-1] < 0:
                raise ValueError(f"the label {label!r}")
            if inputs[-1].shape != inputs[0].shape:
                raise ValueError(f"the shape {list(inputs[-1].shape)} after {list(inputs[0].shape)}")
        except Exception as error:
            raise ValueError(
                f"--data: expected pairs (input, label) of one shape and labels 0, 1, ... from {name}, "
                f"got {error} at {what} sample {row}"
            ) from error
    stacked = torch.stack(inputs)
    return stacked.float() if stacked.is_floating_point() else stacked, torch.tensor(labels)


def _tensor(sample) -> Tensor:
    if isinstance(sample, Tensor):
        return sample.detach().cpu()
    if hasattr(sample, "convert"):  # a PIL image
        sample = np.array(sample.convert("L" if sample.mode in _GREY_MODES else "RGB"))
        return torch.from_numpy(np.atleast_3d(sample)).movedim(-1, 0)
    return torch.as_tensor(np.asarray(sample))
