"""Image data of the fine-tuning job: where it is looked for, how it is read, and the order of its batches.

Both trainers, Python and C++, take batches in one order: epoch e draws ``torch.randperm(n)`` from a generator seeded
``seed + e``, and each batch then draws its horizontal flips from the same generator.
"""

from __future__ import annotations

import gzip
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Batch = tuple[tuple[Tensor, ...], Tensor]  # the model's arguments, and labels [N]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class LabelledData:
    """What every data set of the job has: a training and a test set with a class for each sample.

    Attributes:
        name: What the data is called in tables and plots.
        source: Where it came from.
        classes: The class names, by label.
        train_labels: int64 ``[N]``.
        test_labels: int64 ``[M]``.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train_labels: Tensor
    test_labels: Tensor

    _samples: ClassVar[str]  # "images" where the fields with the samples are train_images and test_images

    @property
    def train_size(self) -> int:
        """Number of training samples."""
        return len(self.train_labels)

    @property
    def test_size(self) -> int:
        """Number of test samples."""
        return len(self.test_labels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def hold_out(self, rows: int) -> Self:
        """The last ``rows`` training samples as the test set, and the rest as the training set.

        Raises:
            ValueError: They would leave nothing to train on.
        """
        if rows >= self.train_size:
            raise ValueError(f"holdout: expected fewer than the {self.train_size} training samples, got {rows}")
        first, samples = self.train_size - rows, getattr(self, f"train_{self._samples}")
        return self._of(samples[:first], self.train_labels[:first], samples[first:], self.train_labels[first:])

    def subset(self, train_rows: int | None, test_rows: int | None) -> Self:
        """The first ``train_rows`` and ``test_rows`` samples; None keeps them all."""
        train, test = (getattr(self, f"{part}_{self._samples}") for part in ("train", "test"))
        return self._of(
            train[:train_rows], self.train_labels[:train_rows], test[:test_rows], self.test_labels[:test_rows]
        )

    def _of(self, train, train_labels: Tensor, test, test_labels: Tensor) -> Self:
        samples = {f"train_{self._samples}": train, f"test_{self._samples}": test}
        return replace(self, train_labels=train_labels, test_labels=test_labels, **samples)


@dataclass(frozen=True)
class ImageData(LabelledData):
    """A training and a test set of images held in memory.

    Attributes:
        train_images: uint8 ``[N, C, H, W]``.
        test_images: uint8 ``[M, C, H, W]``.
        mean: Mean of the training pixels, on the scale 0 to 1.
        std: Their standard deviation, on the same scale.
        flip: Whether training batches are flipped left to right at random.
    """

    train_images: Tensor
    test_images: Tensor
    mean: float
    std: float
    flip: bool

    _samples = "images"

    @property
    def in_channels(self) -> int:
        """Number of channels of an image."""
        return self.train_images.shape[1]

    @property
    def model_arguments(self) -> dict[str, int]:
        """What a model's function is told about the inputs."""
        return {"in_channels": self.in_channels}

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images as float32 with the training set's mean 0 and standard deviation 1."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)

    def train_batch(self, indices: Tensor, generator: torch.Generator | None) -> Batch:
        """The training samples at ``indices``; ``generator`` decides the flips, None leaves the images as they are."""
        images = self.normalize(self.train_images[indices])
        if self.flip and generator is not None:
            flipped = torch.rand(len(indices), generator=generator) < 0.5
            images[flipped] = images[flipped].flip(-1)
        return (images,), self.train_labels[indices]

    def skip_train_batch(self, size: int, generator: torch.Generator) -> None:
        """Draw from ``generator`` what train_batch draws for a batch of ``size``: how a resumed run finds its place."""
        if self.flip:
            torch.rand(size, generator=generator)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """The test set in order."""
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size), strict=True):
            yield (self.normalize(images),), labels


def calibration_batches(data, batch_size: int, count: int, seed: int) -> list[Batch]:
    """``count`` batches of training samples, drawn by ``seed`` and not augmented: what observers see."""
    order = torch.randperm(data.train_size, generator=torch.Generator().manual_seed(seed))
    return [data.train_batch(indices, None) for indices in order[: batch_size * count].split(batch_size)]


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor in an IDX file, gzipped or not (the format of MNIST).

    Raises:
        ValueError: The file is no IDX file of bytes, or is truncated.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, OSError, gzip.zlib.error) as error:
        raise ValueError(f"{path}: expected a readable IDX file, got {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes (starting 00 00 08), got {content[:4].hex(' ')}"
        )
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, got {len(content)}")
    shape = struct.unpack(f">{rank}I", content[4:header])
    count = int(torch.Size(shape).numel())
    if len(content) - header != count:
        raise ValueError(f"{path}: expected {count} bytes for the shape {list(shape)}, got {len(content) - header}")
    if count == 0:
        raise ValueError(f"{path}: expected at least one sample, got the shape {list(shape)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def _idx_path(folder: Path, stem: str) -> Path | None:
    for name in (stem + ".gz", stem):
        if (folder / name).is_file():
            return folder / name
    return None


def load_idx_folder(folder: Path) -> ImageData:
    """The four IDX files of MNIST's layout in ``folder``, as images of one channel.

    Mean and standard deviation are Fashion-MNIST's for 28x28 images with ten classes and are measured otherwise.

    Raises:
        FileNotFoundError: One of the four files is missing; the message names it.
        ValueError: A file is damaged, or images and labels differ in number.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder with {', '.join(IDX_FILES.values())}, or with images in a subfolder for each "
            "class, or a csv file, got none"
        )
    tensors = {}
    for key, stem in IDX_FILES.items():
        path = _idx_path(folder, stem)
        if path is None:
            raise FileNotFoundError(f"{folder}: expected the file {stem}.gz or {stem}, got none")
        tensors[key] = read_idx(path)
    for part in ("train", "test"):
        images, labels = tensors[f"{part}_images"], tensors[f"{part}_labels"]
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: expected {part} images [N, H, W] and labels [N], "
                f"got {list(images.shape)} and {list(labels.shape)}"
            )
        tensors[f"{part}_images"] = images.unsqueeze(1)
        tensors[f"{part}_labels"] = labels.long()
    classes = int(tensors["train_labels"].max()) + 1
    is_fashion = "fashion" in str(folder).lower() and classes == len(FASHION_CLASSES)
    mean, std = (0.2860, 0.3530) if is_fashion else pixel_statistics(tensors["train_images"])
    return ImageData(
        name="Fashion-MNIST" if is_fashion else folder.name,
        source=str(folder),
        classes=FASHION_CLASSES if is_fashion else tuple(str(index) for index in range(classes)),
        mean=mean,
        std=std,
        flip=is_fashion,
        **tensors,
    )


def pixel_statistics(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of uint8 images on the scale 0 to 1."""
    pixels = images.double() / 255
    return float(pixels.mean()), max(float(pixels.std()), 1e-3)


def load_digits_data() -> ImageData:
    """scikit-learn's embedded digits: 1,437 training and 360 test images of 8x8 pixels, ten classes.

    Raises:
        FileNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileNotFoundError(
            "digits: expected the package scikit-learn, got none (pip install scikit-learn)"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    mean, std = pixel_statistics(images[train])
    return ImageData(
        name="digits (scikit-learn)",
        source="sklearn.datasets.load_digits",
        classes=tuple(str(digit) for digit in range(10)),
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        mean=mean,
        std=std,
        flip=False,
    )


def fashion_mnist_folder() -> Path | None:
    """The first folder that holds Fashion-MNIST, or None.

    Looked at in turn: ``$QUANTRAIN_DATA/fashion-mnist`` and ``$QUANTRAIN_DATA``, the folder of Debian's package
    dataset-fashion-mnist, and the cache of an earlier download.
    """
    root = os.environ.get("QUANTRAIN_DATA")
    candidates = [Path(root, "fashion-mnist"), Path(root)] if root else []
    candidates += [DEBIAN_FOLDER, _download_root() / "FashionMNIST" / "raw"]
    for folder in candidates:
        if all(_idx_path(folder, stem) for stem in IDX_FILES.values()):
            return folder
    return None


def _download_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantrain"


def _download_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        FashionMNIST(str(_download_root()), train=True, download=True)
    finally:
        socket.setdefaulttimeout(before)
    return _download_root() / "FashionMNIST" / "raw"


def load_fashion_mnist(download: bool = True) -> ImageData:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747): 60,000 + 10,000 images of 28x28 pixels, ten classes.

    Found by fashion_mnist_folder, else downloaded by torchvision. Where neither works the result is scikit-learn's
    digits, and a notice on stderr says so.

    Raises:
        FileNotFoundError: Nothing was found and scikit-learn is missing too.
    """
    folder = fashion_mnist_folder()
    if folder is None and download:
        print(f"Fashion-MNIST: none found, downloading to {_download_root()}", file=sys.stderr)
        try:
            folder = _download_fashion_mnist()
        except (ImportError, OSError, RuntimeError) as error:
            print(f"Fashion-MNIST: download failed: {error}", file=sys.stderr)
    if folder is not None:
        return replace(
            load_idx_folder(folder), name="Fashion-MNIST", classes=FASHION_CLASSES, mean=0.2860, std=0.3530, flip=True
        )
    print(
        "NOTICE: Fashion-MNIST is not here, so this run uses scikit-learn's 8x8 digits: its accuracies are not those of "
        "Fashion-MNIST. Install Debian's dataset-fashion-mnist or set QUANTRAIN_DATA to a folder that holds it.",
        file=sys.stderr,
    )
    return load_digits_data()


def is_csv(path: Path) -> bool:
    """Whether ``path`` means a csv file, or a folder with train.csv."""
    return path.suffix.lower() == ".csv" or (path / "train.csv").is_file()


def load_image_data(name: str | Path, image_size: int | None = None) -> LabelledData:
    """``fashion-mnist``, ``digits``, a folder with four IDX files or with images in a subfolder for each class, numbers
    in a csv file (or a folder with train.csv and test.csv), or ``module:function``.

    Args:
        name: One of these.
        image_size: Images in subfolders are resized to this many pixels either way.

    Raises:
        FileNotFoundError: The named folder or one of its files is missing.
        ValueError: A file is damaged, the function returns something else, or a size is given for other data.
    """
    from quantrain.finetune import own_data  # which builds on this module

    name = str(name)
    path, known = Path(name), {"fashion-mnist": load_fashion_mnist, "digits": load_digits_data}
    if name not in known and own_data.is_image_folder(path):
        return own_data.load_image_folder(path, image_size)
    if image_size is not None:
        raise ValueError(f"--image-size: expected --data with a folder of images to resize, got {name!r}")
    if name in known:
        return known[name]()
    if ":" in name and not path.exists():
        return own_data.load_function_data(name)
    if is_csv(path):
        return own_data.load_csv_data(path)
    return load_idx_folder(path)
