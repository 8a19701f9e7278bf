"""Stored teachers: what is written, read back lazily, found by index or digest; equal to the teacher itself with k = V."""

import copy
import json
import math
import pickle

import pytest
import torch
from reference import distillation as oracle
from samples.distill import Tokens, close, gradients, ids, models
from torch import nn

from quantrain.distill import Distiller, TopkTeacher, offline, write_topk


def batches(count=3, rows=5):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 11, (2, rows), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_classes_stored_are_the_teacher_itself(tmp_path, temperature):
    student, teacher = models()
    every = batches()
    write_topk(teacher, every, tmp_path, k=11, temperature=temperature, dtype=torch.float32)
    stored = TopkTeacher(tmp_path)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    for index, batch in enumerate(every):
        found = []
        for other, options in ((teacher, {}), (stored, {"index": index}), (stored, {})):
            student.zero_grad()
            distiller = Distiller(student, other, temperature=temperature, mask=lambda _: mask)
            losses = distiller(batch, **options)
            losses.backward()
            found.append((losses.floats(), gradients(student)))
        for values, own in found[1:]:
            assert values == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
            close(own, found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_stored(tmp_path, dtype):
    teacher = Tokens()
    every = batches()
    modes = [module.training for module in teacher.modules()]
    done = []
    stored = write_topk(teacher, every, tmp_path, k=4, temperature=2.0, dtype=dtype, progress=done.append)
    assert done == [1, 2, 3] and modes == [module.training for module in teacher.modules()]
    assert len(stored) == 3 and (stored.k, stored.vocabulary, stored.rows, stored.temperature) == (4, 11, 30, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["topk-00000.safetensors", "topk.json"]
    index = json.loads((tmp_path / "topk.json").read_text())
    assert index["dtype"] == str(dtype).removeprefix("torch.") and index["batches"][1]["shape"] == [2, 5]
    with torch.no_grad():
        exact = torch.log_softmax(teacher(every[1]).double() / 2, -1).topk(4)
    output = stored[1]
    assert output.values.dtype == dtype and output.indices.dtype == torch.int32
    assert torch.equal(output.indices.long(), exact.indices)
    torch.testing.assert_close(
        output.values.double(), exact.values, rtol=2**-10 if dtype == torch.float16 else 1e-6, atol=0
    )
    student = models(seed=3)[0]
    losses = Distiller(student, stored)(every[1])
    expected = oracle.kl_topk(student(every[1]), output.values, output.indices, temperature=2.0).mean()
    assert losses.floats()["kl"] == pytest.approx(expected.item(), rel=1e-4)


def test_files_hold_so_many_bytes_and_are_opened_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "kShardBytes", 2 * 2 * 5 * 4 * 6)  # two batches
    teacher, every = Tokens(), batches(5)
    stored = write_topk(teacher, every, tmp_path, k=4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    opened = []
    exact = offline.safe_open
    monkeypatch.setattr(offline, "safe_open", lambda path, **options: opened.append(path) or exact(path, **options))
    for index in (3, 2, 3):
        with torch.no_grad():
            best = teacher(every[index]).argmax(-1)
        assert torch.equal(stored[index].indices[..., 0].long(), best)
    assert [path[-13:] for path in opened] == ["1.safetensors"]
    again = pickle.loads(pickle.dumps(stored))
    assert torch.equal(again[3].values, stored[3].values) and len(opened) == 2


def test_batches_are_found_by_what_they_hold(tmp_path):
    student, teacher = models()
    every = batches()
    stored = write_topk(teacher, every, tmp_path, k=4)
    for index in (2, 0, 1):
        assert torch.equal(stored.find(every[index].clone()).values, stored[index].values)
    for other in (every[0] + 1, every[0].int(), every[0].T, {"input_ids": every[0]}):
        with pytest.raises(ValueError, match="one of the 3 batches that .* was written from, got other inputs"):
            stored.find(other)
    mapping = {"input_ids": every[0], "attention_mask": torch.ones(2, 5), "labels": every[0]}
    other = write_topk(teacher, [mapping], tmp_path / "mappings", k=4)
    assert torch.equal(other.find({**mapping, "labels": every[1]}).values, other[0].values)  # labels are no input
    with pytest.raises(ValueError, match="got other inputs"):
        other.find({**mapping, "attention_mask": torch.zeros(2, 5)})
    stored.check(every)
    stored.check(iter(every))
    assert set(Distiller(student, stored)(every[0])) == {"loss", "kl"}


def test_other_batches_are_refused(tmp_path):
    every = batches(4)
    stored = write_topk(Tokens(), every[:3], tmp_path, k=4)
    with pytest.raises(ValueError, match="expected 3 batches, as stored, got 2$"):
        stored.check(every[:2])
    with pytest.raises(ValueError, match="expected 3 batches, as stored, got 4 or more"):
        stored.check(every)
    with pytest.raises(ValueError, match="got other inputs in batch 1"):
        stored.check([every[0], every[2], every[1]])
    with pytest.raises(TypeError, match="an iterable of batches"):
        stored.check(every[0])
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"a batch of 3 in .*, got index {index}"):
            stored[index]


def test_another_temperature_vocabulary_or_rows_are_refused(tmp_path):
    student, teacher = models()
    every = batches()
    stored = write_topk(teacher, every, tmp_path, k=4, temperature=3.0)
    assert Distiller(student, stored).temperature == 3.0
    with pytest.raises(ValueError, match="the temperature of the stored teacher, 3.0, .* got 2.0"):
        Distiller(student, stored, temperature=2.0)
    with pytest.raises(ValueError, match="temperature 3.0, as stored, got 2.0"):
        Distiller(student, teacher).loss(student(every[0]), stored[0])
    with pytest.raises(ValueError, match="logits of 11 classes, as stored, got 13"):
        Distiller(Tokens(vocabulary=13), stored)(every[0])
    with pytest.raises(ValueError, match=r"logits of rows \[2, 5\], as stored for this batch, got \[1, 5\]"):
        Distiller(student, stored)(every[0][:1], index=0)
    with pytest.raises(ValueError, match="no pairs with a stored teacher"):
        Distiller(student, stored, {"layers.*": "layers.*"})
    with pytest.raises(ValueError, match="a loss between student and teacher"):
        Distiller(student, stored, kl_weight=0)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"write_topk has finished, got no .*topk.json"):
        TopkTeacher(tmp_path)
    with pytest.raises(FileNotFoundError, match="topk.json"):
        TopkTeacher(tmp_path / "none")
    stored = write_topk(Tokens(), batches(), tmp_path, k=4)
    with pytest.raises(FileExistsError, match="a new or empty folder"):
        write_topk(Tokens(), batches(), tmp_path, k=4)
    index = json.loads((tmp_path / "topk.json").read_text())
    (tmp_path / "topk.json").write_text(json.dumps({**index, "format": 7}))
    with pytest.raises(ValueError, match="format 1 in .*, got 7"):
        TopkTeacher(tmp_path)
    assert stored[0].values.shape == (2, 5, 4)


def refusals():
    teacher, every = Tokens(), batches()
    broken = copy.deepcopy(teacher)
    broken.head.bias.data[3] = math.nan
    return {
        "no module": (TypeError, "torch.nn.Module, got str", ("teacher", every), {}),
        "one batch": (TypeError, "an iterable of batches, got one Tensor", (teacher, every[0]), {}),
        "no batches": (ValueError, "at least one batch, got none", (teacher, []), {}),
        "k 0": (ValueError, "k of at least 1, got 0", (teacher, every), {"k": 0}),
        "k text": (TypeError, "k to be an integer, got '4'", (teacher, every), {"k": "4"}),
        "k above": (ValueError, "k of at most the vocabulary, 11, got 12", (teacher, every), {"k": 12}),
        "temperature": (ValueError, "a finite temperature above 0, got 0", (teacher, every), {"temperature": 0}),
        "dtype": (TypeError, "float16 or float32, got torch.bfloat16", (teacher, every), {"dtype": torch.bfloat16}),
        "nan": (ValueError, "got NaN or infinity in batch 0", (broken, every), {}),
        "vocabularies": (ValueError, "one vocabulary, 4, got 6 in batch 1", (nn.Identity(), [torch.randn(2, 4), torch.randn(2, 6)]), {}),
        "no logits": (TypeError, "logits .* from the teacher", (nn.Embedding(11, 4), [torch.tensor(1)]), {}),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name, tmp_path):
    error, message, arguments, options = REFUSALS[name]
    with pytest.raises(error, match=message):
        write_topk(*arguments, tmp_path, **{"k": 4, **options})
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "kShardBytes", 1)

    def broken():
        yield from batches()
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_topk(Tokens(), broken(), tmp_path, k=4)
    assert list(tmp_path.iterdir()) == []


def test_classes_that_cannot_be_are_stored(tmp_path):
    """Logits of -inf: a probability of 0, which adds nothing."""
    teacher, student = nn.Linear(3, 5), nn.Linear(3, 5)
    with torch.no_grad():
        teacher.bias[2] = -math.inf
    x = torch.randn(4, 3)
    stored = write_topk(teacher, [x], tmp_path, k=5)
    assert bool(stored[0].values.isfinite().all()) and bool((stored[0].indices[:, -1] == 2).all())
    losses = Distiller(student, stored)(x)
    losses.backward()
    assert math.isfinite(losses.floats()["kl"]) and bool(student.weight.grad.isfinite().all())


def test_the_seed_of_batches_does_not_matter(tmp_path):
    """A pass in another order, as a shuffling loader gives it."""
    student, teacher = models()
    every = [ids(seed) for seed in range(4)]
    stored = write_topk(teacher, every, tmp_path, k=11, dtype=torch.float32)
    online = [Distiller(student, teacher)(batch).floats()["kl"] for batch in every]
    order = [2, 0, 3, 1]
    assert [Distiller(student, stored)(every[i]).floats()["kl"] for i in order] == pytest.approx(
        [online[i] for i in order], rel=1e-4
    )
