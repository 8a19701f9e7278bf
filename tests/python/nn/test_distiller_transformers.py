"""Distiller on models of transformers: BERT and Llama, random and tiny."""

import copy
import math
from functools import partial

import pytest
import torch
from reference import distillation as oracle
from samples.distill import close, gradients, hooks_of
from torch.utils.checkpoint import checkpoint

from quantrain.distill import Distiller, Pair, TopkTeacher, write_topk

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")

SIZES = dict(vocab_size=61, num_attention_heads=4, intermediate_size=48)


def bert(kind="ForSequenceClassification", layers=2, width=32, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES, hidden_size=width, num_hidden_layers=layers, **options)
    return getattr(transformers, f"Bert{kind}")(config).eval()  # no dropout, so that passes repeat


def llama(layers=2, width=32, seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 2, "hidden_size": width, "num_hidden_layers": layers, **options}
    )
    return transformers.LlamaForCausalLM(config).eval()


def batch(seed=1, labels=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if labels:
        made["labels"] = torch.where(mask.bool(), ids, -100)
        made["labels"][0, :3] = -100  # a prompt
    return made


def rows(student, teacher, counts):
    expected = oracle.reduced(oracle.kl(student, teacher, temperature=2.0), counts).item()
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_classifier_of_bert():
    student, teacher = bert(layers=2, width=16), bert(layers=4, width=32, seed=1)
    inputs = {**batch(labels=False), "labels": torch.tensor([0, 1, 1])}
    distiller = Distiller(student, teacher, {"layer.*": "layer.*", "pooler": "pooler"}, task_weight=0.5)
    distiller.build(inputs)
    losses = distiller(inputs)
    names = [f"bert.encoder.layer.{i}->bert.encoder.layer.{2 * i + 1}" for i in range(2)]
    assert list(losses) == ["loss", "task", "kl", *(f"mse:{name}" for name in names), "mse:bert.pooler"]
    own, taught = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
    assert losses.floats()["task"] == pytest.approx(own.loss.item(), rel=1e-5)
    assert losses.floats()["kl"] == rows(own.logits, taught.logits, None)
    for place, name in enumerate(names):
        s = distiller.projections[name](own.hidden_states[place + 1])
        expected = oracle.reduced(oracle.mse(s, taught.hidden_states[2 * place + 2]), inputs["attention_mask"])
        assert losses.floats()[f"mse:{name}"] == pytest.approx(expected.item(), rel=1e-4)
    losses.backward()
    assert all(p.grad is not None for p in (*student.bert.parameters(), *distiller.parameters()))
    assert losses.output.logits.shape == (3, 2)


def test_attention_of_bert():
    student, teacher = bert(attn_implementation="eager"), bert(layers=4, seed=1, attn_implementation="eager")
    pairs = [Pair("layer.*.attention.self", "layer.*.attention.self", "attention")]
    losses = Distiller(student, teacher, pairs, kl_weight=0)(batch(labels=False)).floats()
    own, taught = (m(**batch(labels=False), output_attentions=True).attentions for m in (student, teacher))
    counts = batch()["attention_mask"][:, None].expand(3, 4, 7)
    expected = [oracle.reduced(oracle.attention(own[i], taught[2 * i + 1]), counts).item() for i in range(2)]
    assert list(losses.values())[1:] == pytest.approx(expected, rel=1e-4)
    plain = bert(attn_implementation="sdpa")
    with pytest.raises(ValueError, match="'bert.encoder.layer.0.attention.self' .* attn_implementation='eager'"):
        Distiller(plain, bert(attn_implementation="sdpa"), pairs, kl_weight=0)(batch(labels=False))


def test_a_masked_language_model_counts_its_own_labels():
    student, teacher = bert("ForMaskedLM"), bert("ForMaskedLM", seed=1)
    inputs = batch()
    losses = Distiller(student, teacher)(inputs).floats()
    own, taught = (m(**inputs) for m in (student, teacher))
    assert losses["kl"] == rows(own.logits, taught.logits, inputs["labels"] != -100)
    assert losses["task"] == pytest.approx(own.loss.item(), rel=1e-5)


def test_a_causal_language_model_counts_the_next_token():
    student, teacher = llama(layers=2), llama(layers=4, seed=1)
    inputs = batch()
    given = []
    teacher.register_forward_pre_hook(lambda m, args, kwargs: given.append(sorted(kwargs)), with_kwargs=True)
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"}, "cosine")
    losses = distiller(inputs).floats()
    assert given == [["attention_mask", "input_ids"]]  # no labels: no loss of a vocabulary's size
    own, taught = (m(**inputs) for m in (student, teacher))
    counts = torch.cat([inputs["labels"][:, 1:] != -100, torch.zeros(3, 1, dtype=torch.bool)], 1)
    assert losses["kl"] == rows(own.logits, taught.logits, counts & inputs["attention_mask"].bool())
    assert losses["task"] == pytest.approx(own.loss.item(), rel=1e-5)
    assert [name for name in losses if name.startswith("cosine")] == [
        "cosine:model.layers.0->model.layers.1",
        "cosine:model.layers.1->model.layers.3",
    ]
    without = batch(labels=False)
    assert "task" not in distiller(without)
    own, taught = (m(**without) for m in (student, teacher))
    assert distiller(without).floats()["kl"] == rows(own.logits, taught.logits, without["attention_mask"])


def test_checkpointed_layers_count_once():
    student, teacher = llama().train(), llama(layers=4, seed=1)
    distiller = Distiller(student, teacher, {"layers.*": "layers.*", "layers.*.mlp": "layers.*.mlp"})
    with distiller:
        expected = distiller(batch())
        expected.backward()
        exact = gradients(student)
        student.zero_grad()
        for layer in student.model.layers:  # what gradient_checkpointing_enable does, whose name changes
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        losses = distiller(batch())
        losses.backward()
        assert not distiller._student.kept
    assert losses.floats() == pytest.approx(expected.floats())
    close(gradients(student), exact)


def test_vocabularies_are_compared_before_anything_runs():
    student, teacher = llama(), llama(vocab_size=64)
    with pytest.raises(ValueError, match="one vocabulary, got logits of 61 and 64 classes"):
        Distiller(student, teacher)
    assert hooks_of(student, teacher) == 0
    padded = Distiller(student, teacher, {"layers.*": "layers.*"}, kl_weight=0)
    assert math.isfinite(padded(batch()).floats()["loss"])


def test_a_student_that_is_saved_meanwhile(tmp_path):
    student, teacher = llama(), llama(layers=4, seed=1)
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        distiller(batch()).backward()
        student.save_pretrained(tmp_path)
        other = copy.deepcopy(student)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = student(**batch()).logits
    assert torch.equal(loaded(**batch()).logits, expected) and torch.equal(other(**batch()).logits, expected)


def test_a_teacher_that_shares_frozen_embeddings():
    student, teacher = llama(), llama(layers=4, seed=1)
    shared = teacher.model.embed_tokens.requires_grad_(False)
    student.model.embed_tokens = shared
    losses = Distiller(student, teacher, {"layers.*": "layers.*"})(batch())
    losses.backward()
    assert shared.weight.grad is None and student.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_stored_teacher(tmp_path):
    student, teacher = llama(), llama(layers=4, seed=1)
    every = [batch(seed) for seed in range(3)]
    write_topk(teacher, every, tmp_path, k=61, dtype=torch.float32)
    stored = TopkTeacher(tmp_path)
    for inputs in reversed(every):
        online, offline = (Distiller(student, t)(inputs).floats() for t in (teacher, stored))
        assert offline == pytest.approx(online, rel=1e-4)
    with pytest.raises(ValueError, match="61 classes"):
        Distiller(llama(vocab_size=64), stored)


def test_the_mask_of_an_encoder_decoder_is_not_of_its_logits():
    config = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0)
    torch.manual_seed(0)
    student, teacher = (
        transformers.T5ForConditionalGeneration(transformers.T5Config(**config, num_layers=layers)) for layers in (2, 4)
    )
    labels = torch.randint(1, 61, (3, 4))
    labels[1, 2:] = -100
    inputs = {**batch(labels=False), "labels": labels}
    losses = Distiller(student, teacher, {"decoder.block.*": "decoder.block.*"})(inputs)
    own, taught = (m(**inputs) for m in (student, teacher))
    assert losses.floats()["kl"] == rows(own.logits, taught.logits, labels != -100)
    assert losses.floats()["task"] == pytest.approx(own.loss.item(), rel=1e-5)


def test_padding_of_a_vocabulary_can_be_cut_off():
    student, teacher = llama(), llama(vocab_size=64)
    inputs = batch(labels=False)
    distiller = Distiller(student, teacher, logits=lambda output: output.logits[..., :61])
    own, taught = (m(**inputs).logits[..., :61] for m in (student, teacher))
    assert distiller(inputs).floats()["kl"] == rows(own, taught, inputs["attention_mask"])


def test_a_batch_as_keywords():
    distiller = Distiller(llama(), llama(layers=4, seed=1))
    assert distiller(**batch()).floats() == distiller(batch()).floats()
    with pytest.raises(TypeError, match="expected a batch, or its parts as keywords, got both"):
        distiller(batch(), **batch())
    with pytest.raises(TypeError, match="expected a batch, or its parts as keywords, got neither"):
        distiller()
