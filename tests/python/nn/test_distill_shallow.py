"""Students of fewer layers: importance as defined, layers copied and renumbered, the teacher as it was."""

import copy
import dataclasses

import pytest
import torch
from samples.distill import Tokens, hooks_of, ids
from torch import nn
from torch.nn import functional as F

from quantrain.distill import Distiller, layer_importance, shallow_student

BATCHES = [ids(seed) for seed in range(3)]


def teacher(layers=5, seed=0):
    torch.manual_seed(seed)
    model = Tokens(layers=layers).eval()
    with torch.no_grad():  # blocks 1 and 3 hardly do anything
        for place in (1, 3):
            model.layers[place].down.weight.mul_(1e-3)
            model.layers[place].down.bias.zero_()
    return model


def influence(model, batches, mask=None):
    """1 - cos of every block, token by token."""
    turned = [[] for _ in model.layers]
    for batch in batches:
        x = model.embedding(batch)
        for place, layer in enumerate(model.layers):
            y = layer(x)
            cos = F.cosine_similarity(x.double(), y.double(), -1)
            turned[place] += (1 - (cos if mask is None else cos[mask])).flatten().tolist()
            x = y
    return [sum(values) / len(values) for values in turned]


def test_importance_is_one_less_the_mean_cosine():
    model = teacher()
    found = layer_importance(model, BATCHES)
    assert found.scores == pytest.approx(influence(model, BATCHES), abs=1e-7)
    assert [row["layer"] for row in found.rows] == [f"layers.{place}" for place in range(5)]
    assert found.most(3) == [0, 2, 4] and found.title == "importance of 5 layers, 45 tokens"
    assert str(found).splitlines()[2].split() == ["layers.0", f"{found.scores[0]:.4f}"]
    assert hooks_of(model) == 0


def test_masked_tokens_do_not_count():
    model = teacher()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, :2] = mask[2, 4] = True
    found = layer_importance(model, BATCHES, mask=lambda batch: mask)
    assert found.scores == pytest.approx(influence(model, BATCHES, mask), abs=1e-7)
    mappings = [{"input_ids": batch, "attention_mask": mask, "labels": batch} for batch in BATCHES]
    assert layer_importance(model, mappings).scores == found.scores


def test_the_least_important_layers_go():
    model = teacher()
    modes = [module.training for module in model.train().modules()]
    before = copy.deepcopy(model.state_dict())
    student = shallow_student(model, 3, BATCHES)
    assert student.teacher_layers == (0, 2, 4) and len(student.layers) == 3
    for place, layer in zip(student.teacher_layers, student.layers, strict=True):
        for name, parameter in layer.named_parameters():
            own = model.layers[place].get_parameter(name)
            assert torch.equal(parameter, own) and parameter is not own and parameter.data_ptr() != own.data_ptr()
    assert modes == [module.training for module in model.modules()] and student.training and student.layers.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        near = (student.eval()(BATCHES[0]) - model.eval()(BATCHES[0])).norm()
        far = (shallow_student(model, [0, 1, 3])(BATCHES[0]) - model(BATCHES[0])).norm()
    assert near < 0.1 * far


@pytest.mark.parametrize(
    ("count", "of", "expected"),
    [(6, 12, [0, 2, 4, 7, 9, 11]), (1, 5, [0]), (5, 5, [0, 1, 2, 3, 4]), (2, 7, [0, 6])],
)
def test_without_data_layers_are_evenly_spaced(count, of, expected):
    assert list(shallow_student(Tokens(layers=of), count).teacher_layers) == expected


def test_ties_stay_and_sequences_are_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            self.blocks[2].weight = self.first.weight
            self.last = self.blocks[2]

        def forward(self, x):
            return self.last(self.blocks(self.first(x)))

    student = shallow_student(Tied(), [0, 2], blocks="blocks")
    assert type(student.blocks) is nn.Sequential and list(student.blocks._modules) == ["0", "1"]
    assert student.blocks[1].weight is student.first.weight and student.last is student.blocks[1]
    assert len(list(student.parameters())) == 5
    whole = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    assert len(shallow_student(whole, [2], blocks="")) == 1 and len(whole) == 3


def test_configs_that_are_frozen_dataclasses():
    @dataclasses.dataclass(frozen=True)
    class Config:
        num_hidden_layers: int = 5
        layer_types: tuple = ("a", "b", "c", "d", "e")
        other: int = 5

    model = teacher()
    model.config = model.layers[0].config = Config()
    student = shallow_student(model, [0, 3])
    assert student.config == Config(2, ("a", "d"), 5) and student.layers[0].config is student.config
    assert model.config == Config()


def test_it_is_distilled():
    model = teacher()
    student = shallow_student(model, 2, BATCHES)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    values = []
    with Distiller(student, model, {"layers.*": "layers.*"}) as distiller:
        for step in range(60):
            losses = distiller(BATCHES[step % 3])
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            values.append(losses.floats()["loss"])
    assert sum(values[-3:]) < 0.5 * sum(values[:3])


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


def refusals():
    model, none = teacher(), nn.Sequential(nn.Linear(4, 4))
    broken = teacher()
    broken.embedding.weight.data.fill_(torch.nan)
    x = [torch.randn(2, 4)]
    return {
        "no module": (TypeError, "torch.nn.Module, got str", ("model", 2), {}),
        "no blocks": (ValueError, "an nn.ModuleList of blocks of one class in the model, got none", (none, 1), {}),
        "unknown blocks": (ValueError, "got 'heads': no such module", (model, 1), {"blocks": "heads"}),
        "no list": (ValueError, "got 'head': Linear of 0 modules", (model, 1), {"blocks": "head"}),
        "0 layers": (ValueError, "1 to 5 layers, got 0", (model, 0), {}),
        "6 layers": (ValueError, "1 to 5 layers, got 6", (model, 6), {}),
        "text": (TypeError, "layers to be an integer, got 'a'", (model, "a"), {}),
        "half": (TypeError, "layers to be an integer, got 1.5", (model, 1.5), {}),
        "outside": (ValueError, r"rising places of layers in 0 to 4, got \[0, 5\]", (model, [0, 5]), {}),
        "negative": (ValueError, r"got \[-1\]", (model, [-1]), {}),
        "twice": (ValueError, r"got \[1, 1\]", (model, [1, 1]), {}),
        "falling": (ValueError, r"got \[2, 1\]", (model, [2, 1]), {}),
        "none": (ValueError, r"got \[\]", (model, []), {}),
        "batches beside places": (ValueError, "got the places as well", (model, [1, 2], BATCHES), {}),
        "one batch": (TypeError, "an iterable of batches", (model, 2, BATCHES[0]), {}),
        "no batch": (ValueError, "at least one batch that reaches the layers", (model, 2, []), {}),
        "shapes": (ValueError, r"'blocks.1' to give \[2, 4\], as it takes, got \[2, 6\]", (Grows(), 1, x), {}),
        "not reached": (ValueError, "a batch to reach 'layers.1'", (model, 2, BATCHES), {"forward": lambda m, x: m.layers[0](m.embedding(x))}),
        "mask": (ValueError, "layer_importance: .* a mask of the shape of the rows of 'layers.0'", (model, 2, BATCHES), {"mask": lambda x: torch.ones(2)}),
        "nan": (ValueError, "finite hidden states at 'layers.0', got an importance of nan", (broken, 2, BATCHES), {}),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name):
    error, message, arguments, options = REFUSALS[name]
    with pytest.raises(error, match=message):
        shallow_student(*arguments, **options)
    assert not isinstance(arguments[0], nn.Module) or hooks_of(arguments[0]) == 0


# ---- models of transformers ---------------------------------------------------------------------------------------------


def built(kind, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    four = {"num_hidden_layers": 4}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **four)).eval()
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **four, num_key_value_heads=2)).eval()
    if kind == "qwen3":  # every second layer has a window
        types = ["full_attention", "sliding_attention"] * 2
        config = transformers.Qwen3Config(
            **sizes,
            **four,
            num_key_value_heads=2,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=types,
        )
        return transformers.Qwen3ForCausalLM(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=61, n_positions=32, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


PATHS = {"bert": "bert.encoder.layer", "llama": "model.layers", "qwen3": "model.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("kind", PATHS)
def test_a_shallow_model_is_one_of_its_class(kind, tmp_path):
    model = built(kind)
    batch = {"input_ids": torch.randint(1, 61, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    student = shallow_student(model, 2, [batch])
    assert (
        type(student) is type(model) and student.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4
    )
    places = student.teacher_layers
    blocks = student.get_submodule(PATHS[kind])
    assert len(blocks) == 2
    numbers = [m.layer_idx for block in blocks for m in block.modules() if hasattr(m, "layer_idx")]
    assert numbers == sorted(numbers) and set(numbers) <= {0, 1}
    if kind == "qwen3":
        assert student.config.layer_types == [model.config.layer_types[place] for place in places]
    student.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, student(**batch).logits)
    if kind != "bert":  # a cache counts layers
        ids = batch["input_ids"]
        one = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        other = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(one, other)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_encoders_and_decoders_are_counted_apart(side, tmp_path):
    model = built("t5")
    student = shallow_student(model, [1, 2] if side == "decoder" else [0, 3], blocks=f"{side}.block")
    config = student.config
    assert (config.num_layers, config.num_decoder_layers) == ((2, 4) if side == "encoder" else (4, 2))
    student.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert len(loaded.get_submodule(f"{side}.block")) == 2
