"""Writing files: whole or not at all, whoever else writes the same one."""

import json
import multiprocessing
import os
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, safe_open

from quantrain import Recipe, load_checkpoint, save_checkpoint
from quantrain._C import FixedPointNetwork, replace_file
from quantrain.nn import write_safetensors


def contents(value: int) -> dict[str, torch.Tensor]:
    """Tensors that all hold one value: a file of two writers would hold two."""
    return {f"t{i}": torch.full((257,), value, dtype=torch.int32) for i in range(8)}


def write_for(path: str, value: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        write_safetensors(path, contents(value))


def check_reads(path: str, seconds: float) -> set[int]:
    seen, end = set(), time.monotonic() + seconds
    while time.monotonic() < end:
        values = {v.item() for tensor in load_file(path).values() for v in tensor.unique()}
        assert len(values) == 1, f"a file with the tensors of several writers: {values}"
        seen |= values
    return seen


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_several_writers_never_mix(tmp_path, kind):
    path = str(tmp_path / "shared.safetensors")
    write_safetensors(path, contents(0))
    make = threading.Thread if kind == "threads" else multiprocessing.get_context("fork").Process
    writers = [make(target=write_for, args=(path, value, 1.5)) for value in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen = check_reads(path, 1.5)
    for writer in writers:
        writer.join()
        if kind == "processes":
            assert writer.exitcode == 0
    assert len(seen) > 1
    assert os.listdir(tmp_path) == ["shared.safetensors"]


def test_a_file_keeps_its_permissions_and_a_link_its_target(tmp_path):
    target, link = tmp_path / "target.bin", tmp_path / "link.bin"
    replace_file(str(target), b"one")
    assert target.stat().st_mode & 0o777 == 0o666 & ~os_umask()
    target.chmod(0o640)
    link.symlink_to(target)
    replace_file(str(link), b"two")
    assert link.is_symlink() and target.read_bytes() == b"two" and target.stat().st_mode & 0o777 == 0o640


def os_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_stale_temporaries_go_and_other_files_stay(tmp_path):
    stale, other = tmp_path / ".net.bin.123-0.tmp", tmp_path / ".net.bin2.123-0.tmp"
    stale.write_bytes(b"half")
    other.write_bytes(b"of another file")
    replace_file(str(tmp_path / "net.bin"), b"whole")
    assert not stale.exists() and other.exists()


def test_what_cannot_be_written_says_so_and_changes_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(RuntimeError, match="expected a file that can be written"):
            replace_file(str(path), b"x")
    assert list(tmp_path.iterdir()) == []


def test_safetensors_of_every_type_read_by_the_format_s_own_library(tmp_path):
    types = [
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    ]  # fmt: skip
    tensors = {str(t): torch.tensor([0, 1, 3]).to(t) for t in types} | {"empty": torch.empty(0, 4)}
    path = tmp_path / "all.safetensors"
    write_safetensors(str(path), tensors, {"key": 'value " \\ é'})
    found = load_file(path)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}
    assert all(found[k].view(torch.uint8).equal(v.view(torch.uint8)) for k, v in tensors.items() if v.numel())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"key": 'value " \\ é'}


def test_checkpoints_of_threads(tmp_path):
    path = tmp_path / "model.safetensors"
    models = [torch.nn.Linear(64, 64) for _ in range(2)]
    for model, value in zip(models, (1.0, 2.0), strict=True):
        torch.nn.init.constant_(model.weight, value)
        torch.nn.init.constant_(model.bias, value)
    threads = [threading.Thread(target=lambda m=m: [save_checkpoint(path, m) for _ in range(60)]) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = torch.nn.Linear(64, 64)
    load_checkpoint(path, model)
    assert model.weight.unique().equal(model.bias.unique()) and model.weight.unique().numel() == 1


DEEP = "[" * 80_000 + "]" * 80_000


@pytest.mark.parametrize("deep", [DEEP, '{"a":' * 80_000 + "1" + "}" * 80_000, "[" * 80_000])
def test_deep_json_is_refused(tmp_path, deep):
    with pytest.raises(ValueError, match="expected a JSON object"):
        Recipe.from_json(deep)
    with pytest.raises(ValueError, match="expected"):
        Recipe.from_json('{"name": "x", "weight": ' + deep + "}")
    with pytest.raises(ValueError, match="graph: expected JSON text"):
        FixedPointNetwork(deep, {})
    path = tmp_path / "deep.safetensors"
    header = ('{"__metadata__": ' + deep + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="expected a safetensors header"):
        FixedPointNetwork.load(str(path))


def test_brackets_in_strings_do_not_count():
    recipe = Recipe.from_json(json.dumps({"name": "[" * 500 + '"' + "{" * 500, "weight": {}}))
    assert recipe.name.startswith("[[[")


def test_a_link_to_nothing_is_written_through(tmp_path):
    link, target = tmp_path / "link.bin", tmp_path / "later.bin"
    link.symlink_to(target)
    replace_file(str(link), b"one")
    assert link.is_symlink() and target.read_bytes() == b"one"
