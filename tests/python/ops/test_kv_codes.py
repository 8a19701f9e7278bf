"""Keys and values kept as int8 codes: what is kept, and attention to it, against float64."""

import pytest
import torch
from samples.int8 import on_each_device

import quantrain
from quantrain import Int8KvCache, kv_cache_append_, kv_cache_attention

ops = torch.ops.quantrain
TYPES = [torch.float32, torch.float16, torch.bfloat16]
in_each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def operands(batch, tokens, heads, key_heads, size, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, heads + 2 * key_heads, size, generator=g).to(dtype).to(device)
    angle = (torch.rand(1, tokens, size // 2, generator=g) * 6).repeat(1, 1, 2)
    return qkv, angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


def expected_attention(q, cache, position, scale, mask=None):
    """Of float64, q [B, T, H, D]."""
    group = q.shape[2] // cache.key_codes.shape[1]
    keys = (cache.key_codes.double() * cache.key_scale.double()[..., None]).repeat_interleave(group, 1)
    values = (cache.value_codes.double() * cache.value_scale.double()[..., None]).repeat_interleave(group, 1)
    score = torch.einsum("bthd,bhkd->bhtk", q.double(), keys) * scale
    kept = torch.arange(keys.shape[2], device=q.device)
    reached = position.view(-1, 1) + torch.arange(q.shape[1], device=q.device)
    allowed = (kept <= reached[:, :, None]).expand(q.shape[0], -1, -1)
    if mask is not None:
        allowed = allowed & mask[:, None]
    share = torch.softmax(score.masked_fill(~allowed[:, None], -torch.inf), -1).nan_to_num(0)
    return torch.einsum("bhtk,bhkd->bthd", share, values)


@in_each_type
@on_each_device
def test_rows_are_kept_as_they_are_rounded(dtype, device):
    qkv, cos, sin = operands(2, 5, 4, 2, 32, dtype, device)
    cache = Int8KvCache.zeros(2, 2, 16, 32, device)
    turned = qkv.clone()
    quantrain.rotate_heads_(turned, cos, sin, 6)
    position = torch.tensor([3, 7], device=device)
    kv_cache_append_(qkv, cache, position, cos, sin)
    assert torch.equal(qkv, turned)
    for codes, scale, first in ((cache.key_codes, cache.key_scale, 4), (cache.value_codes, cache.value_scale, 6)):
        rows = turned[:, :, first : first + 2].transpose(1, 2).contiguous()
        exact, of_rows = quantrain.int8_quantize_rows(rows)
        for sequence, place in enumerate(position.tolist()):
            assert torch.equal(codes[sequence, :, place : place + 5], exact[sequence])
            assert torch.equal(scale[sequence, :, place : place + 5], of_rows[sequence, ..., 0])
            assert not codes[sequence, :, :place].any() and (scale[sequence, :, place + 5 :] == 1).all()


@on_each_device
def test_tokens_past_the_capacity_are_not_kept(device):
    qkv, _, _ = operands(2, 6, 2, 1, 32, torch.float32, device)
    cache, whole = Int8KvCache.zeros(2, 1, 8, 32, device), Int8KvCache.zeros(2, 1, 16, 32, device)
    position = torch.tensor([5], device=device)
    kv_cache_append_(qkv.clone(), cache, position)
    kv_cache_append_(qkv.clone(), whole, position)
    for found, expected in zip(cache.tensors, whole.tensors, strict=True):
        assert torch.equal(found, expected[:, :, :8])


@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 4, 32), (3, 1, 8, 2, 64), (2, 3, 6, 1, 128), (1, 20, 4, 2, 80), (2, 1, 3, 3, 24)]
)
@in_each_type
@on_each_device
def test_attention(shape, dtype, device):
    batch, tokens, heads, key_heads, size = shape
    cache = Int8KvCache.zeros(batch, key_heads, 64, size, device)
    before, cos, sin = operands(batch, 30, heads, key_heads, size, dtype, device)
    kv_cache_append_(before, cache, torch.zeros(1, dtype=torch.int64, device=device), cos, sin)
    qkv, cos, sin = operands(batch, tokens, heads, key_heads, size, dtype, device, seed=1)
    position = torch.full((batch,), 30, device=device)
    kv_cache_append_(qkv, cache, position, cos, sin)
    mask = torch.rand(batch, 64, generator=torch.Generator().manual_seed(2)).to(device) < 0.7
    mask[:, 0] = True
    slack = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for given in (None, mask):
        found = kv_cache_attention(qkv[:, :, :heads], cache, position, scale=size**-0.5, mask=given)
        exact = expected_attention(qkv[:, :, :heads], cache, position, size**-0.5, given)
        assert found.dtype == dtype and (found.double() - exact).abs().max() < slack


@on_each_device
def test_a_token_that_attends_to_nothing_is_zero(device):
    qkv, _, _ = operands(1, 1, 2, 2, 32, torch.float32, device)
    cache = Int8KvCache.zeros(1, 2, 8, 32, device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    kv_cache_append_(qkv, cache, position)
    mask = torch.zeros(1, 8, dtype=torch.bool, device=device)
    assert not kv_cache_attention(qkv[:, :, :2], cache, position, scale=0.2, mask=mask).any()


@on_each_device
def test_nan_of_a_key_reaches_who_attends_to_it(device):
    qkv, _, _ = operands(2, 1, 2, 2, 32, torch.float32, device)
    qkv[1, 0, 2, 5] = torch.nan
    cache = Int8KvCache.zeros(2, 2, 8, 32, device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    kv_cache_append_(qkv, cache, position)
    y = kv_cache_attention(qkv[:, :, :2], cache, position, scale=0.2)
    assert y[1, 0, 0].isnan().all() and y[0].isfinite().all() and y[1, 0, 1].isfinite().all()


@on_each_device
def test_opcheck(device):
    qkv, cos, sin = operands(2, 2, 4, 2, 32, torch.float32, device)
    cache = Int8KvCache.zeros(2, 2, 8, 32, device)
    position = torch.tensor([1], device=device)
    torch.library.opcheck(ops.kv_cache_append_, (qkv, *cache.tensors, position, cos, sin))
    torch.library.opcheck(ops.kv_cache_attention, (qkv[:, :, :4], *cache.tensors, position), {"scale": 0.2})


def test_errors():
    qkv, cos, _ = operands(2, 2, 4, 2, 32, torch.float32, "cpu")
    cache, position = Int8KvCache.zeros(2, 2, 8, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="kv_cache_append_: expected codes .B, Hk, capacity, D. and scales"):
        kv_cache_append_(qkv[..., :16], cache, position)
    with pytest.raises(ValueError, match="expected qkv of more than twice the cache's 2 heads"):
        kv_cache_append_(qkv[:, :, :4], cache, position)
    with pytest.raises(ValueError, match="expected cos and sin together"):
        kv_cache_append_(qkv, cache, position, cos)
    with pytest.raises(ValueError, match="expected position of one element or one for each sequence, got .3."):
        kv_cache_append_(qkv, cache, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected position of int64, got Float"):
        kv_cache_append_(qkv, cache, torch.zeros(1))
    with pytest.raises(ValueError, match="kv_cache_attention: expected heads to be a multiple of the cache's 2"):
        kv_cache_attention(qkv[:, :, :3], cache, position, scale=0.2)
    with pytest.raises(ValueError, match="expected scale above 0, got 0"):
        kv_cache_attention(qkv[:, :, :4], cache, position, scale=0.0)
    with pytest.raises(ValueError, match="expected mask .B, capacity., got .2, 7."):
        kv_cache_attention(qkv[:, :, :4], cache, position, scale=0.2, mask=torch.ones(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [(1, 4, 32), (1, 5, 16), (3, 5, 32), (5, 32)], ids=str)
@on_each_device
def test_angles_that_do_not_fit_are_refused(wrong, device):
    qkv, cos, _ = operands(2, 5, 4, 2, 32, torch.float32, device)
    cache, position = Int8KvCache.zeros(2, 2, 16, 32, device), torch.tensor([0], device=device)
    with pytest.raises(ValueError, match=r"kv_cache_append_: expected sin \[B or 1, T, D\]"):
        kv_cache_append_(qkv, cache, position, cos, torch.ones(wrong, device=device))
