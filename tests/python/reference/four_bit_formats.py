"""Files of 4-bit weights by their formulas, in numpy and float64: packers that make files, and decoders that read them.

Sources: bitsandbytes 0.50.2, AutoGPTQ 0.7.1, GPTQModel 7.7.0, AutoAWQ 0.2.9, compressed-tensors 0.20.0, hqq 0.2.8 and gguf
0.19.0. Element by element, so that an index is where it reads.
"""

import json
import struct

import numpy as np
import torch

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 += [-x for x in FP4]
TABLES = {name: np.array(table, dtype=np.float32) for name, table in (("nf4", NF4), ("fp4", FP4))}
TABLES["fp4"][8] = 0.0  # not -0


def dynamic_map():
    """The signed dynamic map: midpoints of 2^i + 1 points from 0.1 to 1 times 10^(i - 6), i = 0..6, both signs; 0; 1."""
    values = [0.0, 1.0]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2**i + 1)
        midpoints = (points[:-1] + points[1:]) / 2 * 10.0 ** (i - 6)
        values += midpoints.tolist() + (-midpoints).tolist()
    return np.array(sorted(values), dtype=np.float32)


def key(prefix, name):
    return f"{prefix}.{name}" if prefix else name


def floats(tensor):
    return tensor.double().numpy()


def nibble(word, i):
    """Bits 4 i to 4 i + 3 of an int32."""
    return (int(word) & 0xFFFFFFFF) >> 4 * i & 15


def word(nibbles):
    """The int32 with these 8 nibbles, the first in the lowest bits."""
    value = sum(int(n) << 4 * i for i, n in enumerate(nibbles))
    return value - (1 << 32) if value >> 31 else value


# ---- the layouts that the library's operators take ---------------------------------------------------------------------


def decode(weight):
    """The float64 weight that a FourBitWeight stands for, its columns in the input's order."""
    numel, columns = int(np.prod(weight.size)), weight.size[-1]
    code_bytes = weight.codes.numpy().reshape(-1)
    high_first = weight.format not in ("int4", "uint4")
    scale = scales_of(weight)
    flat = np.empty(numel)
    for e in range(numel):
        byte = int(code_bytes[e // 2])
        code = byte >> 4 if (e % 2 == 0) == high_first else byte & 15
        block = e // weight.block_size
        if weight.format == "int4":
            value = code - 16 if code > 7 else code
        elif weight.format == "uint4":
            value = code - floats(weight.zero_point).reshape(-1)[block]
        elif weight.format == "table":
            value = floats(weight.table)[code]
        else:
            value = float(TABLES[weight.format][code])
        flat[e] = value * scale[block]
    result = flat.reshape(weight.size)
    if weight.permutation is not None:
        unsorted = np.empty_like(result)
        for j in range(columns):
            unsorted[..., int(weight.permutation[j])] = result[..., j]
        return unsorted
    return result


def scales_of(weight):
    """float64, one a block."""
    if weight.scale_scale is None:
        return floats(weight.scale).reshape(-1)
    table, codes = dynamic_map(), weight.scale.numpy().reshape(-1)
    return np.array(
        [
            float(table[c]) * float(weight.scale_scale[b // 256]) + float(weight.scale_offset)
            for b, c in enumerate(codes)
        ]
    )


# ---- bitsandbytes ------------------------------------------------------------------------------------------------------


def bitsandbytes_file(prefix, codes, size, block_size, quant_type="nf4", nested=False, dtype="bfloat16", seed=0):
    """A file of the given codes (flat, 0..15) with random scales."""
    random = np.random.default_rng(seed)
    padded = [*codes, 7 if quant_type == "nf4" else 0] if len(codes) % 2 else codes
    blocks = -(-len(codes) // block_size)
    state = {"quant_type": quant_type, "blocksize": block_size, "dtype": dtype, "shape": list(size)}
    tensors = {
        "weight": torch.tensor(
            [[high << 4 | low] for high, low in zip(padded[::2], padded[1::2], strict=True)], dtype=torch.uint8
        ),
        "weight.absmax": torch.from_numpy(random.uniform(0.5, 3, blocks).astype(np.float32)),
        "weight.quant_map": torch.from_numpy(TABLES[quant_type].copy()),
    }
    if nested:
        tensors["weight.absmax"] = torch.from_numpy(random.integers(0, 256, blocks).astype(np.uint8))
        tensors["weight.nested_absmax"] = torch.from_numpy(
            random.uniform(0.1, 0.5, -(-blocks // 256)).astype(np.float32)
        )
        tensors["weight.nested_quant_map"] = torch.from_numpy(dynamic_map())
        offset = float(np.float32(random.uniform(1, 2)))
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = blob(state)
    return {key(prefix, name): tensor for name, tensor in tensors.items()}


def blob(state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def decode_bitsandbytes(tensors, prefix):
    def part(name):
        return tensors.get(key(prefix, f"weight.{name}"), tensors.get(key(prefix, f"weight_{name}")))

    (state_key,) = [
        k for k in tensors if k.startswith((key(prefix, "weight.quant_state"), key(prefix, "weight_quant_state")))
    ]
    state = json.loads(bytes(tensors[state_key].numpy()))
    code_bytes = tensors[key(prefix, "weight")].contiguous().view(torch.uint8).numpy().reshape(-1)
    table = part("quant_map").numpy()
    scale = part("absmax").numpy()
    if part("nested_absmax") is not None:
        nested_map, nested = part("nested_quant_map").numpy(), part("nested_absmax").numpy()
        offset = float(np.float32(state["nested_offset"]))
        scale = [
            float(nested_map[c]) * float(nested[b // state["nested_blocksize"]]) + offset for b, c in enumerate(scale)
        ]
    flat = []
    for e in range(int(np.prod(state["shape"]))):
        byte = int(code_bytes[e // 2])
        code = byte & 15 if e % 2 else byte >> 4
        flat.append(float(table[code]) * float(scale[e // state["blocksize"]]))
    return np.array(flat).reshape(state["shape"])


# ---- GPTQ --------------------------------------------------------------------------------------------------------------


def gptq_file(prefix, q, scale, zero, version, g_idx=None):
    """q [N, K] and zero [N, G] of 0..15, scale [N, G]."""
    rows, columns = q.shape
    groups = scale.shape[1]
    qweight = [[word(q[n, 8 * i : 8 * i + 8]) for n in range(rows)] for i in range(columns // 8)]
    qzeros = [[word(zero[8 * i : 8 * i + 8, g]) for i in range(rows // 8)] for g in range(groups)]
    if version == 1:
        qzeros = [[signed((int(w) & 0xFFFFFFFF) - 0x11111111) for w in row] for row in qzeros]
    if g_idx is None:
        g_idx = [k * groups // columns for k in range(columns)]
    return {
        key(prefix, "qweight"): torch.tensor(qweight, dtype=torch.int32),
        key(prefix, "qzeros"): torch.tensor(qzeros, dtype=torch.int32),
        key(prefix, "scales"): scale.t().contiguous(),
        key(prefix, "g_idx"): torch.tensor([int(g) for g in g_idx], dtype=torch.int32),
    }


def signed(value):
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def decode_gptq(tensors, prefix, version):
    qweight, qzeros, g_idx = (tensors[key(prefix, name)].numpy() for name in ("qweight", "qzeros", "g_idx"))
    scales = floats(tensors[key(prefix, "scales")])
    rows, columns = qweight.shape[1], qweight.shape[0] * 8
    result = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            group = g_idx[k]
            stored = signed(int(qzeros[group, n // 8]) + (0x11111111 if version == 1 else 0))
            result[n, k] = scales[group, n] * (nibble(qweight[k // 8, n], k % 8) - nibble(stored, n % 8))
    return result


# ---- AWQ ---------------------------------------------------------------------------------------------------------------

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is this one of eight rows of the weight


def awq_file(prefix, q, scale, zero):
    rows, columns = q.shape
    qweight = [[word([q[8 * i + r, k] for r in AWQ_ORDER]) for i in range(rows // 8)] for k in range(columns)]
    qzeros = [[word([zero[8 * i + r, g] for r in AWQ_ORDER]) for i in range(rows // 8)] for g in range(scale.shape[1])]
    return {
        key(prefix, "qweight"): torch.tensor(qweight, dtype=torch.int32),
        key(prefix, "qzeros"): torch.tensor(qzeros, dtype=torch.int32),
        key(prefix, "scales"): scale.t().contiguous(),
    }


def decode_awq(tensors, prefix):
    qweight, qzeros = (tensors[key(prefix, name)].numpy() for name in ("qweight", "qzeros"))
    scales = floats(tensors[key(prefix, "scales")])
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    result = np.empty((rows, columns))
    for n in range(rows):
        i = AWQ_ORDER.index(n % 8)
        for k in range(columns):
            group = k * scales.shape[0] // columns
            result[n, k] = scales[group, n] * (nibble(qweight[k, n // 8], i) - nibble(qzeros[group, n // 8], i))
    return result


# ---- compressed-tensors ------------------------------------------------------------------------------------------------


def padded_words(nibbles):
    nibbles = [*nibbles, *[0] * (-len(nibbles) % 8)]
    return [word(nibbles[i : i + 8]) for i in range(0, len(nibbles), 8)]


def compressed_tensors_file(prefix, q, scale, zero=None, g_idx=None):
    """q and zero as in gptq_file: stored codes are those of -8..7 plus 8."""
    tensors = {
        key(prefix, "weight_packed"): torch.tensor([padded_words(row) for row in q], dtype=torch.int32),
        key(prefix, "weight_scale"): scale,
        key(prefix, "weight_shape"): torch.tensor(q.shape),
    }
    if zero is not None:
        columns = torch.tensor([padded_words(zero[:, g]) for g in range(zero.shape[1])], dtype=torch.int32)
        tensors[key(prefix, "weight_zero_point")] = columns.t().contiguous()
    if g_idx is not None:
        tensors[key(prefix, "weight_g_idx")] = torch.tensor([int(g) for g in g_idx], dtype=torch.int32)
    return tensors


def decode_compressed_tensors(tensors, prefix):
    packed = tensors[key(prefix, "weight_packed")].numpy()
    rows, columns = tensors[key(prefix, "weight_shape")].tolist()
    scale = floats(tensors[key(prefix, "weight_scale")])
    zero = tensors.get(key(prefix, "weight_zero_point"))
    g_idx = tensors.get(key(prefix, "weight_g_idx"))
    result = np.empty((rows, columns))
    for n in range(rows):
        for k in range(columns):
            group = k * scale.shape[1] // columns if g_idx is None else int(g_idx[k])
            z = 8 if zero is None else nibble(zero[n // 8, group], n % 8)
            result[n, k] = scale[n, group] * (nibble(packed[n, k // 8], k % 8) - z)
    return result


# ---- HQQ ---------------------------------------------------------------------------------------------------------------


def hqq_file(prefix, q, group_size, scale, zero, compute_dtype="torch.float16"):
    """q [N, K] of 0..15; scale and zero [N K / group_size, 1]."""
    groups = q.reshape(-1, group_size)
    half = len(groups) // 2

    def text(value):
        return torch.tensor([ord(c) for c in value], dtype=torch.uint8)

    tensors = {
        "W_q": torch.from_numpy((groups[:half] << 4 | groups[half:]).astype(np.uint8)),
        "scale": scale,
        "zero": zero,
        "nbits": torch.tensor(4, dtype=torch.int32),
        "group_size": torch.tensor(group_size, dtype=torch.int32),
        "shape": torch.tensor(q.shape),
        "axis": torch.tensor(1, dtype=torch.int32),
        "packing": text("4bit_u8"),
        "compute_dtype": text(compute_dtype),
        "channel_wise": torch.tensor(1, dtype=torch.uint8),
        "quant_scale": torch.tensor(0, dtype=torch.uint8),
        "quant_zero": torch.tensor(0, dtype=torch.uint8),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }
    return {key(prefix, name): tensor for name, tensor in tensors.items()}


def decode_hqq(tensors, prefix):
    packed = tensors[key(prefix, "W_q")].numpy()
    unpacked = np.concatenate([packed >> 4, packed & 15]).astype(np.float64)
    scale, zero = (floats(tensors[key(prefix, name)]) for name in ("scale", "zero"))
    return ((unpacked - zero) * scale).reshape(tensors[key(prefix, "shape")].tolist())


# ---- GGUF --------------------------------------------------------------------------------------------------------------

GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}
GGUF_VALUES = {"uint8": (0, "B"), "int8": (1, "b"), "uint16": (2, "H"), "int16": (3, "h"), "uint32": (4, "I")}
GGUF_VALUES |= {"int32": (5, "i"), "float32": (6, "f"), "bool": (7, "?"), "uint64": (10, "Q"), "int64": (11, "q")}
GGUF_VALUES |= {"float64": (12, "d")}


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(kind, value):
    """kind: a name in GGUF_VALUES, "string", or either with "[]" after it."""
    if kind.endswith("[]"):
        items = [gguf_value(kind[:-2], item) for item in value]
        number = 8 if kind == "string[]" else GGUF_VALUES[kind[:-2]][0]
        return struct.pack("<IIQ", 9, number, len(value)) + b"".join(item[4:] for item in items)
    if kind == "string":
        return struct.pack("<I", 8) + gguf_text(value)
    number, code = GGUF_VALUES[kind]
    return struct.pack("<I", number) + struct.pack(f"<{code}", value)


def gguf_bytes(tensors, metadata=(), version=3, alignment=32):
    """tensors: (name, type, sizes in row-major order, bytes); metadata: (key, kind, value)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, kind, value in metadata:
        head += gguf_text(name) + gguf_value(kind, value)
    data = b""
    for name, kind, sizes, content in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += gguf_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes[::-1])
        head += struct.pack("<IQ", GGUF_TYPES.get(kind, kind), len(data))
        data += content
    return head + b"\0" * (-len(head) % alignment) + data


def decode_gguf_block(kind, block):
    """The 32 values of one block of a type Q, in float64."""
    d = float(np.frombuffer(block[:2], np.float16)[0])
    if kind == "Q8_0":
        return [d * c for c in np.frombuffer(block[2:34], np.int8).tolist()]
    minimum = float(np.frombuffer(block[2:4], np.float16)[0]) if kind == "Q4_1" else -8 * d
    packed = block[4:20] if kind == "Q4_1" else block[2:18]
    return [d * (b & 15) + minimum for b in packed] + [d * (b >> 4) + minimum for b in packed]
