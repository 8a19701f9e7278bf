"""Layer-by-layer distillation: the steps of blocks trained one by one, what counts of a batch, nothing left behind."""

import copy
import math

import pytest
import torch
from torch import nn

import quantrain.nn as qnn
from quantrain import QuantSpec, Recipe, ptq
from quantrain.finetune.minilm import BertConfig, SentenceClassifier
from quantrain.ptq.distill import LayerDistillation, distill_layers

W4A8 = Recipe(
    weight=QuantSpec(bits=4, granularity="per_channel", observer="dynamic"),
    input=QuantSpec(bits=8, granularity="per_token", observer="dynamic"),
    training=False,
)
LAYERS = [f"bert.encoder.layer.{index}" for index in range(3)]
SKIP = ("*embeddings*", "classifier")


def bert(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(50, 32, 3, 4, 64, 16)
    return SentenceClassifier(config, 2).eval()


def batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.arange(12) < torch.randint(4, 13, (count, 8, 1), generator=generator)
    return [(torch.randint(0, 50, (8, 12), generator=generator), mask) for mask in masks]


def prepared(teacher, recipe=W4A8):
    return qnn.prepare(copy.deepcopy(teacher), recipe, skip=SKIP)


def mask_of(batch):
    return batch[1]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def block_by_block(student, teacher, every, lr, normalize=False):
    """The definition: each block for itself, a teacher pass per block and step."""
    taught, own = teacher.bert.encoder.layer, student.bert.encoder.layer
    for number, block in enumerate(own):
        optimizer = torch.optim.AdamW(block.parameters(), lr=lr, weight_decay=0.0)
        for ids, mask in every:
            with torch.no_grad():
                states, wide = teacher.bert.embeddings(ids), mask[:, None, None, :]
                for earlier in taught[:number]:
                    states = earlier(states, wide)
                target = taught[number](states, wide)
            error = (block(states, wide) - target)[mask].square()
            optimizer.zero_grad()
            error.mean().backward()
            optimizer.step()


def test_trains_as_blocks_alone_do():
    teacher, every = bert(), batches(3)
    student, expected = prepared(teacher), prepared(teacher)
    distill_layers(student, teacher, every, steps=3, lr=1e-3, mask=mask_of)
    block_by_block(expected, teacher, every, 1e-3)
    for (name, got), (_, wanted) in zip(student.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_fall_and_the_table_says_so():
    teacher, every = bert(), batches()
    student = prepared(teacher)
    # At 2e-3 weights that differ by 1e-5 end anywhere between 0.54 and 0.86 of the loss; at this rate at 0.38 to 0.46.
    result = distill_layers(student, teacher, every, steps=30, lr=5e-4, mask=mask_of)
    assert isinstance(result, LayerDistillation)
    assert [row["layer"] for row in result.rows] == LAYERS
    assert all(0 < row["after"] < 0.8 * row["before"] for row in result.rows)
    lines = str(result).splitlines()
    assert lines[1].split() == ["layer", "loss", "before", "loss", "after"]
    assert lines[2].split() == [LAYERS[0], f"{result.rows[0]['before']:.4g}", f"{result.rows[0]['after']:.4g}"]
    with torch.no_grad():
        far, near = ((model(*every[0]) - teacher(*every[0])).norm() for model in (prepared(teacher).eval(), student))
    assert near < far


def test_a_recipe_of_the_scheme_ptq_before_conversion():
    teacher, every = bert(), batches()
    recipe = qnn.changed_recipe("zeroquant-w4a8", {"weight": {"group_size": 16}})
    student = qnn.calibrate(qnn.prepare(copy.deepcopy(teacher), recipe), every)
    result = distill_layers(student, teacher, every, steps=20, lr=1e-4, mask=mask_of)
    assert all(row["after"] < 0.7 * row["before"] for row in result.rows)
    with torch.no_grad():
        expected = student.eval()(*every[0])
        torch.testing.assert_close(qnn.convert(student)(*every[0]), expected, rtol=0, atol=1e-2)


def test_everything_in_a_block_trains_and_nothing_outside():
    teacher = bert()
    student = prepared(teacher)
    frozen = student.bert.encoder.layer[1].attention.output.dense.bias.requires_grad_(False)
    before, taught = state_of(student), state_of(teacher)
    distill_layers(student, teacher, batches(), steps=2, lr=1e-3, mask=mask_of)
    after = state_of(student)
    changed = {name for name, _ in student.named_parameters() if not torch.equal(before[name], after[name])}
    inside = {name for name, p in student.named_parameters() if ".encoder." in name and p is not frozen}
    never = {name for name in inside if name.endswith("key.bias")}  # softmax does not see a key's bias
    assert inside - never <= changed <= inside
    assert all(torch.equal(taught[name], tensor) for name, tensor in teacher.state_dict().items())


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    teacher = bert()
    student = prepared(teacher).train()
    teacher.bert.encoder.layer[0].train()
    modes = [[m.training for m in model.modules()] for model in (student, teacher)]
    parameter = student.bert.encoder.layer[0].output.dense.weight
    parameter.grad = kept = torch.ones_like(parameter)
    teacher.classifier.requires_grad_(False)
    wanted = [p.requires_grad for p in teacher.parameters()]
    before = state_of(student)
    if fails:
        with torch.no_grad():
            student.bert.encoder.layer[2].output.dense.bias[0] = math.nan
        before = state_of(student)
        with pytest.raises(ValueError, match=r"finite loss of block 'bert.encoder.layer.2', got nan"):
            distill_layers(student, teacher, batches(), steps=2, lr=1e-3, mask=mask_of)
        assert all(torch.equal(before[n], t) or "layer.2" in n for n, t in student.state_dict().items())
    else:
        distill_layers(student, teacher, batches(), steps=2, lr=1e-3, mask=mask_of)
    assert modes == [[m.training for m in model.modules()] for model in (student, teacher)]
    assert parameter.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()] if p is not parameter)
    assert wanted == [p.requires_grad for p in teacher.parameters()]
    assert hooks_of(student) == hooks_of(teacher) == 0
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_masked_tokens_do_not_count():
    teacher = bert()
    ids, mask = batches(1)[0]
    other = torch.where(mask, ids, (ids + 7) % 50)
    losses = []
    for tokens in (ids, other):
        student = prepared(teacher)
        losses.append(distill_layers(student, teacher, [(tokens, mask)], steps=1, lr=1e-3, mask=mask_of).rows)
    for one, two in zip(*losses, strict=True):
        assert one["before"] == pytest.approx(two["before"], rel=1e-5)
    every = distill_layers(prepared(teacher), teacher, [(other, mask)], steps=1, lr=1e-3).rows
    assert every[0]["before"] != pytest.approx(losses[1][0]["before"], rel=1e-3)


class Sinks(nn.Module):
    """Two linear blocks; a token of ones in every place of the input is a thousand times larger than others."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_sink_is_not_the_whole_loss():
    torch.manual_seed(0)
    teacher = Sinks()
    x = torch.randn(4, 10, 16)
    x[:, 0] *= 1000
    student = qnn.prepare(teacher, W4A8, inplace=False)

    def before(normalize, value=x):
        rows = distill_layers(student, teacher, [value], steps=1, lr=0.0, normalize=normalize).rows
        return [row["before"] for row in rows]

    auto, none, every = before("auto"), before(False), before(True)
    plain = before(False, x[:, 1:])
    assert none[0] > 1e3 * plain[0]
    assert auto[0] == pytest.approx(plain[0], rel=0.2)  # a sink counts as one more token
    assert every[0] == pytest.approx(plain[0], rel=0.5)
    assert before("auto", x[:, 1:]) == pytest.approx(plain)
    with torch.no_grad():
        output, target = student.blocks[0](x), teacher.blocks[0](x)
        norm = target.flatten(0, 1).norm(dim=-1)
        error = (output - target).flatten(0, 1).square().sum(-1)
        weight = torch.where(norm > 10 * norm.median(), (norm.median() / norm).square(), 1.0)
    assert auto[0] == pytest.approx(float((weight * error).sum() / target.numel()), rel=1e-5)


def test_batches_begin_again_and_an_iterator_is_read_once():
    teacher, every = bert(), batches(3)
    steps, students = [], []
    for source in (every, iter(every), every * 3):
        student = prepared(teacher)
        distill_layers(
            student,
            teacher,
            source,
            steps=7,
            lr=1e-3,
            mask=mask_of,
            progress=lambda step, loss: steps.append((step, loss)),
        )
        students.append(state_of(student))
    assert [step for step, _ in steps] == [*range(1, 8)] * 3
    assert steps[:7] == steps[7:14] == steps[14:] and all(loss > 0 for _, loss in steps)
    for other in students[1:]:
        assert all(torch.equal(students[0][name], tensor) for name, tensor in other.items())


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config), "model.layers", ("lm_head", "*embed*")


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), "transformer.h", ("lm_head", "*wte", "*wpe")


def hugging_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    return transformers.BertForSequenceClassification(config), "bert.encoder.layer", ("*embeddings*", "classifier")


@pytest.mark.filterwarnings("ignore:prepare")
@pytest.mark.parametrize("build", [llama, gpt2, hugging_bert])
def test_models_of_transformers(build):
    torch.manual_seed(0)
    teacher, path, skip = build()
    teacher.eval()
    student = qnn.prepare(copy.deepcopy(teacher), W4A8, skip=skip)
    mask = torch.ones(4, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    batch = {"input_ids": torch.randint(0, 61, (4, 10)), "attention_mask": mask}
    result = distill_layers(student, teacher, [batch], steps=20, lr=2e-4)
    assert [row["layer"] for row in result.rows] == [f"{path}.{index}" for index in range(3)]
    assert all(row["after"] < 0.9 * row["before"] for row in result.rows)
    masked = distill_layers(student, teacher, [{**batch, "attention_mask": None}], steps=1, lr=0.0)
    assert masked.rows[0]["before"] != result.rows[0]["after"]


@pytest.mark.parametrize("normalize", ["auto", True, False])
def test_padding_counts_neither_in_the_loss_nor_in_the_median(normalize):
    torch.manual_seed(0)
    teacher, x = Sinks(), torch.randn(2, 5, 16)
    mask = torch.ones(2, 5)
    mask[:, 2:] = 0
    options = {"steps": 1, "lr": 0.0, "normalize": normalize}
    losses = []
    for value, shown in ((x, mask), (torch.cat([x[:, :2], x[:, 2:] * 1e4], 1), mask), (x[:, :2], None)):
        student = qnn.prepare(teacher, W4A8, inplace=False)
        rows = distill_layers(student, teacher, [value], mask=lambda _, shown=shown: shown, **options).rows
        losses.append([row["before"] for row in rows])
    assert losses[1] == pytest.approx(losses[0]) and losses[2] == pytest.approx(losses[0])


def test_nan_in_padding_is_not_trained_on():
    teacher, x = Sinks(), torch.randn(2, 5, 16)
    x[0, 4] = math.nan
    student = qnn.prepare(teacher, W4A8, inplace=False)
    before = state_of(student)
    with pytest.raises(ValueError, match="finite loss of block 'blocks.0', got nan"):
        distill_layers(student, teacher, [x], mask=lambda _: ~x.isnan().any(-1))
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


class Nested(nn.Module):
    """Blocks that give tuples and take their state by name, each with a list of more modules than there are blocks."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, *, states, extra=None):
            return {"none": None, "states": sum(expert(states) for expert in self.experts)}, extra

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.Tanh(), nn.ReLU()])
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(states=x, extra=[x])[0]["states"]
        return x


def test_blocks_that_give_more_than_a_tensor():
    torch.manual_seed(0)
    teacher = Nested()
    student = qnn.prepare(teacher, W4A8, inplace=False)
    result = distill_layers(student, teacher, [torch.randn(2, 5, 8)], steps=20, lr=2e-4)
    assert [row["layer"] for row in result.rows] == ["blocks.0", "blocks.1"]
    assert all(row["after"] < row["before"] for row in result.rows)
    alone = distill_layers(student, teacher, [torch.randn(2, 5, 8)], blocks=["blocks.1.experts.3"], steps=2)
    assert [row["layer"] for row in alone.rows] == ["blocks.1.experts.3"]


@pytest.mark.filterwarnings("ignore:prepare")
def test_the_inference_path_of_torchs_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 2).eval()
    student = qnn.prepare(copy.deepcopy(teacher), W4A8)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    hidden[0, 4:] = True
    forward = lambda model, x: model(x, src_key_padding_mask=hidden)
    result = distill_layers(
        student, teacher, [torch.randn(3, 6, 16)], steps=10, lr=2e-4, forward=forward, mask=lambda _: ~hidden
    )
    assert all(row["after"] < row["before"] for row in result.rows)


class WritesInPlace(Sinks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x).mul_(2)
        return x


class SkipsOne(Sinks):
    def forward(self, x):
        return self.blocks[0](x) if self.skips else super().forward(x)

    skips = False


def refusals():
    teacher = Sinks()
    student = qnn.prepare(teacher, W4A8, inplace=False)
    x = [torch.randn(2, 3, 16)]
    wider = Sinks()
    wider.blocks[1] = nn.Linear(16, 8)
    shorter = Sinks()
    del shorter.blocks[1]
    in_place, skipping, calling = WritesInPlace(), SkipsOne(), SkipsOne()
    in_place_student = qnn.prepare(in_place, W4A8, inplace=False)
    skipping_student = qnn.prepare(skipping, W4A8, inplace=False)
    calling_student = qnn.prepare(calling, W4A8, inplace=False)
    skipping.skips = calling_student.skips = True
    half = qnn.prepare(copy.deepcopy(teacher), W4A8).half()
    frozen = qnn.prepare(copy.deepcopy(teacher), W4A8)
    frozen.blocks[1].requires_grad_(False)
    four = lambda _: torch.ones(4)
    no_list = nn.Sequential(nn.Linear(4, 4))
    converted = qnn.convert(qnn.prepare(copy.deepcopy(teacher), W4A8))
    return {
        "no batches": (ValueError, "at least one batch, got none", (student, teacher, []), {}),
        "an empty iterator": (ValueError, "at least one batch, got none", (student, teacher, iter([])), {}),
        "one batch": (TypeError, "iterable of batches, got one Tensor", (student, teacher, x[0]), {}),
        "no module": (TypeError, "torch.nn.Module, got str", ("student", teacher, x), {}),
        "no list": (ValueError, "an nn.ModuleList of blocks", (no_list, copy.deepcopy(no_list), x), {}),
        "no blocks": (ValueError, "at least one block", (student, teacher, x), {"blocks": []}),
        "a name": (TypeError, "a list of names, got the str 'blocks.0'", (student, teacher, x), {"blocks": "blocks.0"}),
        "unknown": (ValueError, "a module of the teacher, got 'h.0'", (student, teacher, x), {"blocks": ["h.0"]}),
        "nested": (ValueError, "'blocks.0' within 'blocks'", (student, teacher, x), {"blocks": ["blocks", "blocks.0"]}),
        "no steps": (ValueError, "at least one step, got 0", (student, teacher, x), {"steps": 0}),
        "normalize": (ValueError, "True, False or 'auto', got 'all'", (student, teacher, x), {"normalize": "all"}),
        "shapes": (ValueError, r"'blocks.1' .* 'weight' of shape \[8, 16\]", (student, wider, x), {}),
        "shorter": (ValueError, "the teacher's block 'blocks.1', got none", (shorter, teacher, x), {}),
        "converted": (ValueError, "got none .a prepared model is trained", (converted, teacher, x), {}),
        "shared": (ValueError, "shares 'blocks.0.weight'", (teacher, teacher, x), {}),
        "half": (ValueError, "in float32, got blocks.0.weight in torch.float16", (half, teacher, x), {}),
        "frozen": (ValueError, "'blocks.1' to have parameters that train", (frozen, teacher, x), {}),
        "in place": (ValueError, "block 'blocks.0' to stay", (in_place_student, in_place, x), {}),
        "teacher skips": (ValueError, "teacher to call block 'blocks.1'", (skipping_student, skipping, x), {}),
        "student skips": (ValueError, "call block 'blocks.1' as often", (calling_student, calling, x), {}),
        "mask": (ValueError, "as block 'blocks.0' has tokens, 6, got .4.", (student, teacher, x), {"mask": four}),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name):
    error, message, arguments, options = REFUSALS[name]
    with pytest.raises(error, match=rf"^(distill_layers|prepare): .*{message}"):
        distill_layers(*arguments, **{"steps": 2, **options})
    for model in arguments[:2]:
        assert not isinstance(model, nn.Module) or hooks_of(model) == 0


class Chain(nn.Module):
    """Blocks on residuals, with weights large enough that 4 bits per channel hurt."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_recipe_distils_between_calibration_and_conversion():
    torch.manual_seed(0)
    model, batches, kl = Chain(), [torch.randn(128, 32) for _ in range(8)], {}
    change = {"weight": {"granularity": "per_channel"}, "scheme": {"attention_bits": 0}}
    for name in ("zeroquant-w4a8", "zeroquant-w4a8-lkd"):
        told = []
        found = ptq.quantize(
            copy.deepcopy(model),
            qnn.changed_recipe(qnn.as_recipe(name), change),
            batches,
            progress=lambda done, of, text, told=told: told.append(text),
        )
        kl[name] = found.ptq_report.kl
        assert (found.ptq_distillation is not None) == ("lkd" in name)
        assert any("distillation" in text for text in told) == ("lkd" in name)
    assert [row["layer"] for row in found.ptq_distillation.rows] == ["blocks.0", "blocks.1"]
    assert all(row["after"] < 0.8 * row["before"] for row in found.ptq_distillation.rows)
    assert kl["zeroquant-w4a8-lkd"] < 0.75 * kl["zeroquant-w4a8"]


def test_recipes_that_distil_want_batches_and_nearest():
    with pytest.raises(ValueError, match="expected batches to distill 'zeroquant-w4a8-lkd' on, got none"):
        ptq.quantize(Chain(), "zeroquant-w4a8-lkd")
    with pytest.raises(ValueError, match="expected parameters of float32 to distill"):
        ptq.quantize(Chain().bfloat16(), "zeroquant-w4a8-lkd", [torch.randn(4, 32)])
    frozen = Chain().requires_grad_(False)
    ptq.quantize(frozen, "zeroquant-w8a8-lkd", [torch.randn(16, 32)], max_kl=None)
    assert len(frozen.ptq_distillation.rows) == 2
    with pytest.raises(ValueError, match="rounded to nearest alone"):
        qnn.changed_recipe(qnn.as_recipe("gptq-w4a16"), {"scheme": {"distill_steps": 10}}).validate()
