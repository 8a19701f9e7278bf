"""Distiller: sums and gradients as PyTorch composes them, what counts of a batch, how pairs match, what is refused."""

import copy
import math

import pytest
import torch
from reference import distillation as oracle
from samples.distill import Block, Tokens, close, gradients, hidden_of, hooks_of, ids, models
from torch import nn
from torch.nn import functional as F

from quantrain.distill import Distiller, Pair
from quantrain.distill.pairs import evenly_spaced

# ---- the oracle, and the losses ---------------------------------------------------------------------------------------


def oracle_inputs(name):
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    if name == "distillation_kl_topk":
        best = torch.log_softmax(t / 2, -1).topk(3)
        return (s, best.values, best.indices), {"temperature": 2.0}
    if name == "attention_kl":
        s, t = s.softmax(-1), t.softmax(-1)
        s[0, 2], t[1, 3] = 1e-8, 0
    return (s, t), {"distillation_kl": {"temperature": 2.0}}.get(name, {})


@pytest.mark.parametrize("name", [*oracle.LOSSES, "normalized"])
def test_the_written_derivatives_are_those_of_autograd(name):
    options = {"normalize": True} if name == "normalized" else {}
    name = "hidden_mse" if name == "normalized" else name
    rows, gradient = oracle.LOSSES[name]
    (student, *rest), extra = oracle_inputs(name)
    student.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1])
    loss = oracle.reduced(rows(student, *rest, **options, **extra), mask)
    (expected,) = torch.autograd.grad(loss, student)
    found = oracle.reduced_gradient(gradient(student.detach(), *rest, **options, **extra), mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not found[2].any() and found[0].any()


PAIR_LOSSES = {
    "mse": lambda s, t: oracle.mse(s, t),
    "mse-normalized": lambda s, t: oracle.mse(s, t, normalize=True),
    "cosine": oracle.cosine,
}


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_the_sum_and_its_gradient_are_those_of_the_plain_composition(loss):
    student, teacher = models(layers=(2, 4))
    x, labels = ids(), ids(2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    with Distiller(
        student, teacher, {"layers.*": "layers.*"}, (loss, 0.5), temperature=3.0, kl_weight=2.0, task_weight=0.25
    ) as distiller:
        with torch.no_grad():
            taught = teacher(x)
        output = student(x)
        task = F.cross_entropy(output.flatten(0, 1), labels.flatten())
        losses = distiller.loss(output, taught, task, mask)
        losses.backward()
    found = gradients(student)
    student.zero_grad()

    exact, wise = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    s, t = hidden_of(exact, x), [state.detach() for state in hidden_of(wise, x)]
    logits = exact.head(s[-1])
    parts = {
        "task": F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        "kl": oracle.reduced(oracle.kl(logits, wise.head(t[-1]).detach(), temperature=3.0), mask),
        f"{loss}:layers.0->layers.1": oracle.reduced(PAIR_LOSSES[loss](s[1], t[2]), mask),
        f"{loss}:layers.1->layers.3": oracle.reduced(PAIR_LOSSES[loss](s[2], t[4]), mask),
    }
    weights = [0.25, 2.0, 0.5, 0.5]
    total = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
    total.backward()
    assert list(losses) == ["loss", *parts]
    values = losses.floats()
    assert values["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert all(values[name] == pytest.approx(part.item(), rel=1e-5, abs=1e-7) for name, part in parts.items())
    close(found, {n: p.grad.float() for n, p in exact.named_parameters()}, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_call_runs_both_models():
    student, teacher = models()
    batch = {"input_ids": ids(), "attention_mask": torch.ones(3, 5), "labels": ids(2)}
    task = lambda output, batch: F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten())
    distiller = Distiller(student, teacher, {"layers.*": "layers.*"}, task=task, task_weight=0.5)
    losses = distiller(batch)
    assert hooks_of(student, teacher) == 0 and losses.output.requires_grad
    with distiller:
        taught = distiller.teach(batch)
        assert not taught.requires_grad
        output = student(batch["input_ids"])
        same = distiller.loss(output, taught, task(output, batch), batch["attention_mask"])
        assert same.floats() == losses.floats()
    with torch.no_grad():  # measures
        assert distiller(batch).floats() == losses.floats()
    assert "task" not in Distiller(student, teacher)({"input_ids": ids()})
    without = Distiller(student, teacher, task=task, task_weight=0.0)(batch)
    assert list(without) == ["loss", "kl"]


def test_results_of_every_kind_have_logits():
    student, teacher = models()
    x = ids()
    plain, taught = student(x), teacher(x).detach()
    distiller = Distiller(student, teacher)
    expected = distiller.loss(plain, taught).floats()

    class Output:
        def __init__(self, logits):
            self.logits = logits

    for wrap in (Output, lambda y: (torch.tensor(1.0), y), lambda y: {"loss": 0, "logits": y}, lambda y: [y, x]):
        assert distiller.loss(wrap(plain), wrap(taught)).floats() == expected
    chosen = Distiller(student, teacher, logits=lambda output: output["answer"][..., :7])
    assert 0 < chosen.loss({"answer": plain}, {"answer": taught}).floats()["kl"] != expected["kl"]
    for wrong in ("text", torch.zeros(3), {"logits": None}, torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(TypeError, match="Distiller: expected logits"):
            distiller.loss(plain, wrong)


def test_the_first_items_of_a_batch_are_used_as_in_calibrate():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(5, 4)
    distiller = Distiller(student, teacher)
    assert distiller([x, torch.zeros(5)]).floats() == distiller(x).floats()
    compiled = torch.compile(student, backend="eager")
    assert Distiller(compiled, teacher)((x, torch.zeros(5))).floats() == distiller(x).floats()
    doubled = Distiller(student, teacher, forward=lambda model, batch: model(batch["x"] * 2))
    assert doubled({"x": x}).floats() == distiller(2 * x).floats()


# ---- what counts --------------------------------------------------------------------------------------------------------


def test_a_mask_of_tokens_samples_or_nothing():
    student, teacher = models()
    x, rest = ids(), ids(5)
    mask = torch.tensor([1, 0, 1])
    with Distiller(student, teacher, {"layers.*": "layers.*"}) as distiller:
        several = []
        for tokens in (x, torch.where(mask[:, None].bool(), x, rest)):  # what a masked sample holds does not matter
            taught = distiller.teach(tokens)
            several.append(distiller.loss(student(tokens), taught, mask=mask).floats())
        taught = distiller.teach(x)
        tokens = distiller.loss(student(x), taught, mask=mask[:, None].expand(3, 5).bool()).floats()
    assert several[0] == several[1] == pytest.approx(tokens)
    pooled = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 4))
    distiller = Distiller(pooled, copy.deepcopy(pooled).requires_grad_(False), mask=lambda batch: torch.zeros(3, 5))
    assert distiller(x).floats()["kl"] == 0.0
    other = Distiller(
        pooled, nn.Sequential(copy.deepcopy(pooled), nn.Linear(4, 4)), mask=lambda batch: torch.zeros(3, 5)
    )
    assert other(x).floats()["kl"] > 0  # a classifier's logits have no tokens


@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_label_do_not_count(causal):
    student, teacher = models()
    x, labels = ids(), ids(2)
    labels[0, :3] = labels[2, 4] = -100
    batch = {"input_ids": x, "labels": labels, "attention_mask": torch.ones(3, 5)}
    batch["attention_mask"][1, 0] = 0
    losses = Distiller(student, teacher, causal=causal, task_weight=0.0)(batch)
    counts = labels != -100
    if causal:
        counts = torch.cat([counts[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], 1)
    counts = counts & batch["attention_mask"].bool()
    expected = oracle.reduced(oracle.kl(student(x), teacher(x), temperature=2.0), counts)
    assert losses.floats()["kl"] == pytest.approx(expected.item(), rel=1e-5)
    classes = {"input_ids": x, "labels": torch.tensor([1, -100, 0])}  # of samples, which rows are not
    every = Distiller(student, teacher, causal=causal, task_weight=0.0)(classes)
    exact = oracle.reduced(oracle.kl(student(x), teacher(x), temperature=2.0))
    assert every.floats()["kl"] == pytest.approx(exact.item(), rel=1e-5)


def test_nan_is_seen_and_padding_may_hold_it():
    student, teacher = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)) for _ in range(2))
    x = torch.randn(5, 4)
    x[2] = math.nan
    losses = Distiller(student, teacher, {"0": "0"})(x).floats()
    assert all(math.isnan(value) for value in losses.values())
    counts = Distiller(student, teacher, {"0": "0"}, mask=lambda batch: ~batch.isnan().any(-1))
    assert all(math.isfinite(value) for value in counts(x).floats().values())


# ---- pairs --------------------------------------------------------------------------------------------------------------


def names_of(pairs, student, teacher, **options):
    return [(pair.student, pair.teacher) for pair in Distiller(student, teacher, pairs, **options).pairs]


def test_patterns_match_one_part_of_a_name():
    student, teacher = models(layers=(2, 4))
    even = [("layers.0", "layers.1"), ("layers.1", "layers.3")]
    assert names_of({"layers.*": "layers.*"}, student, teacher) == even
    assert names_of([Pair("layers.?", "lay*.*")], student, teacher) == even
    assert names_of({"layers.*": ["layers.0", "layers.3"]}, student, teacher) == [
        ("layers.0", "layers.0"),
        ("layers.1", "layers.3"),
    ]
    assert names_of({"layers.1": "layers.0", "head": "head"}, student, teacher) == [
        ("layers.1", "layers.0"),
        ("head", "head"),
    ]
    assert [pair[0] for pair in names_of({"layers.*.up": "layers.*.up"}, student, teacher)] == [
        "layers.0.up",
        "layers.1.up",
    ]


def test_the_ends_of_names_match_where_no_whole_name_does():
    student, teacher = (nn.ModuleDict({"bert": nn.ModuleDict({"encoder": model})}) for model in models())
    assert names_of({"layers.*": "encoder.layers.*"}, student, teacher)[1] == (
        "bert.encoder.layers.1",
        "bert.encoder.layers.3",
    )
    with pytest.raises(ValueError, match=r"modules of one parent in the student, got those of 'bert.encoder.layers.0'"):
        Distiller(student, teacher, {"up": "head"})


def test_even_spacing_ends_at_the_last():
    for total in range(1, 13):
        for count in range(1, total + 1):
            places = evenly_spaced(count, total)
            assert places == sorted(set(places)) and places[-1] == total - 1 and len(places) == count
            gaps = [b - a for a, b in zip([-1, *places], places, strict=False)]
            assert max(gaps) - min(gaps) <= 1


def test_each_pair_has_its_loss_and_weight():
    student, teacher = models(layers=(2, 2))
    losses = {"layers.0": ("cosine", 2.0), "layers.1": "mse-normalized"}
    by_name = Distiller(student, teacher, {"layers.0": "layers.0", "layers.1": "layers.1", "head": "head"}, losses)
    assert [(pair.label, pair.weight) for pair in by_name.pairs] == [
        ("cosine:layers.0", 2.0),
        ("mse-normalized:layers.1", 1.0),
        ("mse:head", 1.0),
    ]
    listed = Distiller(
        student,
        teacher,
        [Pair("layers.*", "layers.*"), Pair("layers.*", "layers.*", "cosine"), Pair("head", "head", "mse", 0.0)],
        kl_weight=0.0,
    )
    assert len(listed.pairs) == 4
    losses = listed(ids()).floats()
    assert list(losses) == ["loss", "mse:layers.0", "mse:layers.1", "cosine:layers.0", "cosine:layers.1"]
    assert losses["loss"] == pytest.approx(sum(list(losses.values())[1:]))

    def largest(s, t, mask):
        assert s.requires_grad and not t.requires_grad and mask is None
        return (s - t).abs().max()

    own = Distiller(student, teacher, {"layers.*": "layers.*"}, largest, kl_weight=0.0)(ids())
    assert list(own) == ["loss", "largest:layers.0", "largest:layers.1"]
    own.backward()
    assert student.embedding.weight.grad.any()


class Shared(nn.Module):
    """One block, called several times."""

    def __init__(self, calls):
        super().__init__()
        self.block, self.calls = Block(8), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.block(x)
        return x


def test_a_module_that_is_called_several_times_has_the_mean_of_its_calls():
    torch.manual_seed(0)
    student, teacher, x = Shared(2), Shared(2), torch.randn(3, 8)
    losses = Distiller(student, teacher, {"block": "block"}, kl_weight=0.0)(x)
    s, t = [student.block(x)], [teacher.block(x)]
    s.append(student.block(s[0]))
    t.append(teacher.block(t[0]))
    expected = sum(oracle.mse(a, b).mean().item() for a, b in zip(s, t, strict=True)) / 2
    assert losses.floats()["loss"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="to call 'block' as often as the teacher calls 'block', 3 times, got 2"):
        Distiller(student, Shared(3), {"block": "block"})(x)


def test_maps_are_compared_with_their_channels_last():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1)),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(1)),
    )
    x = torch.randn(2, 3, 5, 5)
    distiller = Distiller(student, teacher, {"0": "0"}, "cosine", kl_weight=0.0)
    distiller.build(x)
    layer = distiller.projections["0->0"]
    assert (layer.in_features, layer.out_features) == (4, 6)
    projected = layer(student[0](x).movedim(1, -1))
    expected = oracle.cosine(projected, teacher[0](x).movedim(1, -1)).mean()
    assert distiller(x).floats()["loss"] == pytest.approx(expected.item(), rel=1e-5)


class Attends(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, average_attn_weights=False)[0]


def test_attention_probabilities():
    torch.manual_seed(0)
    student, teacher, x = Attends(2), Attends(2), torch.randn(3, 5, 8)
    mask = torch.ones(3, 5)
    mask[1, 3:] = 0
    distiller = Distiller(student, teacher, {"attention": "attention"}, "attention", kl_weight=0, mask=lambda _: mask)
    losses = distiller(x)
    s, t = (model.attention(x, x, x, average_attn_weights=False)[1] for model in (student, teacher))
    expected = oracle.reduced(oracle.attention(s, t), mask[:, None].expand(3, 2, 5))
    assert losses.floats()["attention:attention"] == pytest.approx(expected.item(), rel=1e-5)
    losses.backward()
    assert student.attention.in_proj_weight.grad.any()
    with pytest.raises(ValueError, match="as the teacher's 'attention' does"):
        Distiller(student, Attends(4), {"attention": "attention"}, "attention", kl_weight=0)(x)
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'0' of the teacher to give attention probabilities"):
        Distiller(plain, copy.deepcopy(plain), {"0": "0"}, "attention", kl_weight=0)(torch.randn(3, 8))


# ---- what is refused --------------------------------------------------------------------------------------------------------


def refusals():
    student, teacher = models()
    other = Tokens(vocabulary=13)
    deeper = models(layers=(4, 2))
    pairs = {"layers.*": "layers.*"}
    return {
        "no module": (TypeError, "torch.nn.Module, got str", ("student", teacher), {}),
        "no teacher": (TypeError, "torch.nn.Module, got NoneType", (student, None), {}),
        "itself": (ValueError, "shares 'embedding.weight', which trains", (student, student), {}),
        "no losses": (ValueError, "no pairs .* and kl_weight=0", (student, teacher), {"kl_weight": 0}),
        "task alone": (ValueError, "no pairs", (student, teacher), {"kl_weight": 0, "task_weight": 1.0}),
        "all weights 0": (ValueError, "no pairs", (student, teacher, pairs, ("mse", 0)), {"kl_weight": 0}),
        "losses alone": (ValueError, "pairs beside losses, got losses='cosine'", (student, teacher, None, "cosine"), {}),
        "temperature 0": (ValueError, "a finite temperature above 0, got 0", (student, teacher), {"temperature": 0}),
        "temperature -1": (ValueError, "above 0, got -1.0", (student, teacher), {"temperature": -1.0}),
        "temperature nan": (ValueError, "above 0, got nan", (student, teacher), {"temperature": math.nan}),
        "temperature text": (ValueError, "above 0, got '2'", (student, teacher), {"temperature": "2"}),
        "weight": (ValueError, "kl_weight to be a finite number of at least 0, got -1", (student, teacher), {"kl_weight": -1}),
        "pair weight": (ValueError, "weight of pair 'layers.*' .* got inf", (student, teacher, pairs, ("mse", math.inf)), {}),
        "unknown loss": (ValueError, "to be one of mse, mse-normalized, cosine, attention", (student, teacher, pairs, "l1"), {}),
        "unknown key": (ValueError, "those of pairs, 'layers.*', got 'layer.*'", (student, teacher, pairs, {"layer.*": "mse"}), {}),
        "no layer": (ValueError, r"'layer.\*' to name a module of the student, got none .nearest: 'layers.\*'", (student, teacher, {"layer.*": "layers.*"}), {}),
        "no teacher's layer": (ValueError, "'heads' to name a module of the teacher, got none .nearest: 'head'", (student, teacher, {"head": "heads"}), {}),
        "counts": (ValueError, "got 4 of the student and 2 of the teacher", (*deeper, pairs), {}),
        "list counts": (ValueError, "got 2 of the student and 1 of the teacher", (student, teacher, {"layers.*": ["layers.0"]}), {}),
        "twice": (ValueError, "each pair once, got 'mse:head' twice", (student, teacher, [Pair("head", "head")] * 2), {}),
        "a name": (TypeError, "a mapping of names or a list of Pair, got 'layers'", (student, teacher, "layers"), {}),
        "losses and a list": (ValueError, "losses in the list of Pair", (student, teacher, [Pair("head", "head")], "cosine"), {}),
        "vocabulary": (ValueError, "one vocabulary, got logits of 11 and 13 classes", (student, other), {}),
        "rows": (ValueError, r"the same rows from both models, got \[3, 5, 11\] .* \[2, 5, 11\]", (student, teacher), {"forward": lambda m, x: m(x[:2] if m is teacher else x)}),
        "mask": (ValueError, r"a mask of the shape of the rows of logits, \[3, 5\], got \[3, 4\]", (student, teacher), {"mask": lambda x: torch.ones(3, 4)}),
        "hidden mask": (ValueError, r"the rows of 'layers.0', \[3, 5\], got \[2\]", (student, teacher, pairs), {"mask": lambda x: torch.ones(2), "kl_weight": 0}),
        "an index": (ValueError, "an index with a stored teacher alone, got 0", (student, teacher), {"index": 0}),
        "not called": (ValueError, "'layers.1.down' of the teacher to be called", (student, teacher, {"head": "layers.1.down"}), {"forward": lambda m, x: m.head(m.embedding(x)) if m is teacher else m(x)}),
        "gives ids": (ValueError, r"'0' of the teacher to give a tensor \[.., D\], got none", (nn.Sequential(nn.Identity(), student), nn.Sequential(nn.Identity(), teacher), {"0": "0"}), {}),
    }  # fmt: skip


REFUSALS = refusals()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name):
    error, message, arguments, options = REFUSALS[name]
    with pytest.raises(error, match=rf"^Distiller: expected .*{message}"):
        index = options.get("index")
        Distiller(*arguments, **{k: v for k, v in options.items() if k != "index"})(ids(), index=index)
    for model in arguments[:2]:
        assert not isinstance(model, nn.Module) or (hooks_of(model) == 0 and model.training)
        assert not isinstance(model, nn.Module) or all(p.requires_grad for p in model.parameters())
