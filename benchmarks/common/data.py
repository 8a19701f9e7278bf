"""CIFAR-10-JPEG and tinyshakespeare as tensors, or random data of the same form where a test has neither."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = ("train_images", "train_labels", "test_images", "test_labels")
DECODERS = 16  # processes


@dataclass(frozen=True)
class Images:
    """uint8 images ``[N, 3, 32, 32]`` and int64 labels ``[N]``, in the order of the archive (class after class)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def data_root() -> Path:
    """$QUANTRAIN_DATA.

    Raises:
        ValueError: it is unset or no folder.
    """
    root = os.environ.get("QUANTRAIN_DATA", "")
    if not root or not Path(root).is_dir():
        raise ValueError(f"expected QUANTRAIN_DATA to name the folder of the data, got {root!r}")
    return Path(root)


def _decode(entry: tuple[str, bytes]) -> tuple[str, np.ndarray]:
    from PIL import Image

    name, content = entry
    return name, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)


def decode_archive(path: Path) -> dict[str, np.ndarray]:
    """The JPEGs of ``{train,test}/CLASS/*.jpg`` in a tar archive, by the names of :class:`Images`."""
    with tarfile.open(path) as archive:
        members = (member for member in archive if member.name.endswith(".jpg"))
        entries = [(member.name, archive.extractfile(member).read()) for member in members]
    with get_context("fork").Pool(min(DECODERS, os.cpu_count() or 1)) as pool:
        decoded = pool.map(_decode, sorted(entries), chunksize=500)
    arrays = {}
    for part in ("train", "test"):
        chosen = [(name, image) for name, image in decoded if name.startswith(f"{part}/")]
        arrays[f"{part}_images"] = np.stack([image for _, image in chosen])
        arrays[f"{part}_labels"] = np.array([CLASSES.index(name.split("/")[1]) for name, _ in chosen], dtype=np.int64)
    return arrays


def cifar10_jpeg(cache: Path | None = None) -> Images:
    """CIFAR-10-JPEG from $QUANTRAIN_DATA; decoded once into ``cache`` (a folder of .npy files) for later processes."""
    cache = cache or Path(tempfile.gettempdir()) / "cifar10-jpeg"
    if not all((cache / f"{part}.npy").is_file() for part in PARTS):
        arrays = decode_archive(data_root() / "cifar10-jpeg" / "cifar10-jpeg.tar.xz")
        cache.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            np.save(cache / f"{part}.partial.npy", arrays[part])
            (cache / f"{part}.partial.npy").rename(cache / f"{part}.npy")
    return Images(**{part: torch.from_numpy(np.load(cache / f"{part}.npy")) for part in PARTS})


def random_images(train: int = 512, test: int = 128) -> Images:
    """Images of noise around a mean that the class decides: learnable, and no data set is needed."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randint(40, 216, (len(CLASSES), 3, 1, 1), generator=generator)
    tensors = {}
    for part, count in (("train", train), ("test", test)):
        labels = torch.randint(len(CLASSES), (count,), generator=generator)
        noise = torch.randint(-40, 40, (count, 3, 32, 32), generator=generator)
        tensors[f"{part}_images"] = (means[labels] + noise).to(torch.uint8)
        tensors[f"{part}_labels"] = labels
    return Images(**tensors)


def tinyshakespeare() -> Tensor:
    """The bytes of $QUANTRAIN_DATA/tinyshakespeare/input.txt, uint8."""
    return torch.frombuffer(bytearray((data_root() / "tinyshakespeare" / "input.txt").read_bytes()), dtype=torch.uint8)


def random_text(size: int = 20_000) -> Tensor:
    """Bytes that each follow from the one before or not, uint8."""
    generator = torch.Generator().manual_seed(0)
    jumps = torch.randint(0, 3, (size,), generator=generator)
    return (97 + jumps.cumsum(0) % 26).to(torch.uint8)


def pretrained_resnet20() -> dict[str, Tensor]:
    """The state dict of akamaster's ResNet-20 under $QUANTRAIN_DATA/resnet-cifar10-pretrained."""
    folder = data_root() / "resnet-cifar10-pretrained"
    stored = torch.load(next(iter(sorted(folder.glob("resnet20-*.th")))), map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in stored["state_dict"].items()}
