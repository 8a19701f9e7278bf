"""Data of the user: folders of images, csv files, functions that return datasets; each read right, each fault named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytest.importorskip("quantrain._C", reason="the compiled library is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (with extra [train])")

from quantrain.finetune import data, job, own_data, text  # noqa: E402
from quantrain.finetune.cli import build_parser, main, make_config  # noqa: E402
from quantrain.finetune.results import read_results  # noqa: E402


def write_image(path: Path, value: int, shape: tuple[int, ...] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twenty grey images of two classes, dark and light."""
    for row in range(10):
        write_image(tmp_path / "photos" / "dark" / f"{row}.png", row)
        write_image(tmp_path / "photos" / "light" / f"{row}.PNG", 200 + row)
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    (tmp_path / "photos" / "dark" / ".DS_Store").write_text("mine")
    return tmp_path / "photos"


# Image folders


def test_image_folder_holds_out_every_tenth(photos):
    found = data.load_image_data(str(photos))
    assert (found.name, found.classes, found.train_size, found.test_size) == ("photos", ("dark", "light"), 18, 2)
    assert found.train_images.shape == (18, 1, 6, 5) and found.train_images.dtype == torch.uint8
    values = torch.cat([found.train_images, found.test_images])[:, 0, 0, 0].tolist()
    assert sorted(values) == [*range(10), *range(200, 210)]
    assert torch.equal(found.train_images[:, 0, 0, 0] >= 200, found.train_labels == 1)
    (images,), _ = found.train_batch(torch.arange(18), None)
    assert abs(float(images.mean())) < 1e-5 and found.model_arguments == {"in_channels": 1}


def test_images_are_not_resized_beyond_memory(photos):
    with pytest.raises(ValueError, match="--image-size: expected at most 2048 pixels, got 100000"):
        data.load_image_data(str(photos), 100000)


@pytest.mark.parametrize("name", own_data.TEST_FOLDERS)
def test_image_folder_with_a_test_set(photos, name):
    (photos.parent / "both").mkdir()
    photos.rename(photos.parent / "both" / "train")
    write_image(photos.parent / "both" / name / "light" / "x.png", 99)
    found = data.load_image_data(str(photos.parent / "both"))
    assert (found.train_size, found.test_size, found.test_labels.tolist()) == (20, 1, [1])


def test_images_are_of_colour_where_one_is(photos):
    write_image(photos / "dark" / "red.jpg", 0, (6, 5, 3))
    found = data.load_image_data(str(photos))
    assert found.train_images.shape[1:] == (3, 6, 5)
    assert all(torch.equal(image[0], image[1]) for image in found.train_images)


def test_images_are_resized_on_request(photos):
    write_image(photos / "dark" / "other.png", 3, (9, 12))
    with pytest.raises(ValueError, match=r"dark/.*: expected images of one size, got .*; --image-size N resizes them"):
        data.load_image_data(str(photos))
    found = data.load_image_data(str(photos), 8)
    assert found.train_images.shape[1:] == (1, 8, 8)
    with pytest.raises(
        ValueError, match="--image-size: expected --data with a folder of images to resize, got 'digits'"
    ):
        data.load_image_data("digits", 8)


def test_bad_image_folders_are_named(photos, tmp_path):
    (photos / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ValueError, match=r"dark/broken\.png: expected a readable image, got "):
        data.load_image_data(str(photos))
    (photos / "dark" / "broken.png").unlink()
    Image.fromarray(np.full((6, 5), 40_000, dtype=np.uint16)).save(photos / "dark" / "wide.png")
    with pytest.raises(ValueError, match=r"dark/wide\.png: expected a readable image, got more than 8 bits a channel"):
        data.load_image_data(str(photos))
    write_image(tmp_path / "one" / "only" / "a.png", 1)
    write_image(tmp_path / "one" / "only" / "b.png", 1)
    with pytest.raises(ValueError, match="one: expected at least two classes in the training set, got only"):
        data.load_image_data(str(tmp_path / "one"))
    write_image(tmp_path / "split" / "train" / "a" / "a.png", 1)
    write_image(tmp_path / "split" / "train" / "b" / "a.png", 1)
    with pytest.raises(ValueError, match=r"split: expected images of a test set in test/<class>/"):
        data.load_image_data(str(tmp_path / "split"))
    write_image(tmp_path / "split" / "test" / "c" / "a.png", 1)
    with pytest.raises(ValueError, match="split: expected test labels among the training classes, got 'c'"):
        data.load_image_data(str(tmp_path / "split"))


# csv files


def write_csv(path: Path, rows: int = 30) -> Path:
    lines = [f"{row % 3},{'yes' if row % 3 else 'no'},{5 * (row % 3)},7" for row in range(rows)]
    path.write_text("a,label,b,constant\n" + "\n".join(lines) + "\n")
    return path


def test_csv_of_numbers(tmp_path):
    found = data.load_image_data(str(write_csv(tmp_path / "flowers.csv")))
    assert (found.name, found.classes, found.train_size, found.test_size) == ("flowers", ("no", "yes"), 27, 3)
    assert found.train_inputs.dtype == torch.float32 and found.model_arguments == {"in_features": 3}
    assert torch.allclose(found.train_inputs.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(found.train_inputs.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)
    assert torch.equal(found.train_inputs[:, 0] == found.train_inputs[:, 0].min(), found.train_labels == 0)
    assert found.hold_out(7).test_size == 7 and found.subset(4, 1).train_size == 4
    assert sum(len(labels) for _, labels in found.test_batches(2)) == 3


def test_csv_folder_with_a_test_file(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", 4)
    found = data.load_image_data(str(tmp_path))
    assert (found.train_size, found.test_size, found.test_labels.tolist()) == (30, 4, [0, 1, 1, 0])
    (tmp_path / "test.csv").write_text("b,label\n1,yes\n")
    with pytest.raises(ValueError, match=r"test\.csv: expected the columns of train\.csv, got b, label"):
        data.load_image_data(str(tmp_path))


def test_labels_that_are_numbers_are_sorted_as_such():
    classes, train, test = own_data.index_labels("x", ["10", "9", "10"], ["9"])
    assert (classes, train.tolist(), test.tolist()) == (("9", "10"), [1, 0, 1], [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "expected one column named label, got the columns a, b"),
        ("a,label\n1,x\n2\n", "expected 2 values in row 2, got 1"),
        ("a,label\n1,x\n2,y\n1,x\n2,y\nnan,y\n", "expected a finite number in the column a, got 'nan'"),
        (
            "a,label\n1,x\n2,y\n1,x\n2,y\na film,y\n",
            "expected a finite number in the column a, got 'a film' (sentences: --job sst2)",
        ),
        ("a,label\n", "expected at least one row, got none"),
        ("", "expected one column named label, got the columns none"),
        ("label\nx\ny\nx\n", "expected columns of numbers beside label, got none"),
        ("a,label\n1,x\n", "expected at least two rows, got 1"),
        ("a,label\n1,x\n2,x\n3,x\n", "expected at least two classes in the training set, got x"),
        ('a,label\n"1,x\n', "expected a csv file in UTF-8, got "),
    ],
)
def test_bad_csv_is_named(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.csv: ") as error:
        data.load_image_data(str(path))
    assert message in str(error.value)


def test_csv_of_sentences(tmp_path):
    class Tokenizer:
        def encode_batch(self, sentences):
            return [type("Encoding", (), {"ids": [101, *map(len, sentence.split()), 102]}) for sentence in sentences]

    path = tmp_path / "films.csv"
    path.write_text("label,text\n" + "".join(f'{"good" if row % 2 else "bad"},"film, no {row}"\n' for row in range(20)))
    found = text.load_text_data(str(path), Tokenizer())
    assert (found.classes, found.train_size, found.test_size) == (("bad", "good"), 18, 2)
    assert all(ids == [101, 5, 2, len(str(row)), 102] or len(ids) == 5 for row, ids in enumerate(found.train_ids))
    assert found.subset(5, 1).train_size == 5
    path.write_text("label,words\ngood,film\n")
    with pytest.raises(ValueError, match="expected a column named sentence or text, got the columns label, words"):
        text.load_text_data(str(path), Tokenizer())
    with pytest.raises(FileNotFoundError, match=r"none\.csv: expected a csv file with the column label, got none"):
        text.load_text_data(str(tmp_path / "none.csv"), Tokenizer())


# Functions


def rows_of_numbers():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    return TensorDataset(inputs[:48].double(), labels[:48]), TensorDataset(inputs[48:], labels[48:])


class _Pictures:
    classes = ("cat", "dog")

    def __len__(self):
        return 12

    def __getitem__(self, row):
        return Image.fromarray(np.full((4, 4, 3), row % 2 * 100, dtype=np.uint8)), row % 2


def pictures():
    return _Pictures(), _Pictures()


def one_dataset():
    return _Pictures()


def ragged():
    return [(torch.zeros(3), 0), (torch.zeros(4), 1)], [(torch.zeros(3), 0)]


def float_labels():
    return [(torch.zeros(3), 0.5)], [(torch.zeros(3), 0)]


def empty():
    return [], [(torch.zeros(3), 0)]


def linear(num_classes: int, in_features: int) -> nn.Module:
    return nn.Linear(in_features, num_classes)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_datasets_of_a_function(importable):
    found = data.load_image_data("test_finetune_own_data:rows_of_numbers")
    assert (found.train_size, found.test_size, found.classes) == (48, 16, ("0", "1"))
    assert found.train_inputs.dtype == torch.float32 and torch.equal(
        found.train_labels == 1, found.train_inputs[:, 0] > 0
    )
    found = data.load_image_data("test_finetune_own_data:pictures")
    assert found.train_images.shape == (12, 3, 4, 4) and found.classes == ("cat", "dog")
    assert found.train_images[1].unique().tolist() == [100] and found.train_labels[:3].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_dataset", "to return a training and a test dataset, got ValueError"),
        ("ragged", "got the shape [4] after [3] at training sample 1"),
        ("float_labels", "got the label 0.5 at training sample 0"),
        ("empty", "to return datasets with samples, got 0 and 1"),
        ("nothing", "expected a function in test_finetune_own_data, got 'nothing', which it does not have"),
    ],
)
def test_bad_functions_are_named(importable, name, message):
    with pytest.raises(ValueError, match="--data: expected") as error:
        data.load_image_data(f"test_finetune_own_data:{name}")
    assert message in str(error.value)


# From the shell


@pytest.mark.parametrize("kind", ["images", "csv", "function"])
def test_own_data_from_the_shell(tmp_path, photos, importable, monkeypatch, capsys, kind):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
    monkeypatch.setattr(job.Job, "_plot_grids", lambda *_: None)
    words = {
        "images": ["--data", str(photos), "--image-size", "8"],
        "csv": ["--data", str(write_csv(tmp_path / "flowers.csv", 300)), "--epochs", "20"],
        "function": [
            "--data", "test_finetune_own_data:rows_of_numbers", "--model", "test_finetune_own_data:linear", "--epochs", "40",
        ],
    }[kind]  # fmt: skip
    some = [
        "--batch-size",
        "16",
        "--recipes",
        "qat-w8a8",
        "--calibration-batches",
        "2",
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert main(["finetune", *some, "--lr", "0.05", *words]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    names = {"images": "resnet20-photos", "csv": "mlp-flowers"}
    assert folder.name == names.get(kind, "test_finetune_own_data-linear-test_finetune_own_data-rows_of_numbers")
    results = read_results(folder)
    assert kind == "images" or results["qat-w8a8"].accuracy > 0.9
    assert json.loads((folder / "config.json").read_text())["data"] == words[1]


def test_recipes_that_pack_weights_need_no_calibration(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
    monkeypatch.setattr(job.Job, "_write_report", lambda *_: None)
    path = str(write_csv(tmp_path / "flowers.csv", 300))
    words = f"finetune --data {path} --epochs 20 --lr 0.05 --batch-size 16 --recipes qlora nf4 --name t --runs {tmp_path / 'runs'}"
    assert main(words.split()) == 0
    results = read_results(tmp_path / "runs" / "t")
    assert results["qlora"].accuracy > 0.9 and results["nf4"].accuracy > 0.9
    assert results["nf4"].weight_bytes < results["float32"].weight_bytes / 2


def test_a_csv_file_gets_a_model_for_numbers(tmp_path):
    write_csv(tmp_path / "train.csv")
    assert make_config(build_parser().parse_args(["finetune", "--data", str(tmp_path)])).model == "mlp"
    config = make_config(build_parser().parse_args(["finetune", "--data", "x/flowers.csv"]))
    assert (config.model, config.name) == ("mlp", "mlp-flowers")
    config = make_config(build_parser().parse_args(["finetune", "--job", "sst2", "--data", "films.csv"]))
    assert config.model == "minilm"
