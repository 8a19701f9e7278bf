"""Losses of a student against its teacher: against float64, with gradients, masks, strided rows, compiled, refusals."""

import pytest
import torch
from reference import distillation as reference
from torch.library import opcheck

import quantrain

ops = torch.ops.quantrain
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LOSSES = ["distillation_kl", "distillation_kl_topk", "hidden_mse", "hidden_cosine", "attention_kl"]
# One column, a warp's rows, no whole vectors, a block's rows, long ones whose rows are not aligned.
SHAPES = [(3, 1), (2, 3, 33), (5, 512), (4, 1030), (3, 4096), (2, 9000), (2, 50257)]
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def operands(loss, shape, dtype=torch.float32, device="cpu", seed=0, spread=3.0):
    """student, and what follows it: a teacher, or stored values and indices."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=g) * spread
    teacher = student + torch.randn(shape, generator=g) * spread / 2
    if loss == "attention_kl":
        student, teacher = torch.softmax(student, -1), torch.softmax(teacher, -1)
    if loss == "distillation_kl_topk":
        values, indices = torch.log_softmax(teacher / 2, -1).topk(min(shape[-1], 7), -1)
        return student.to(device, dtype), (values.to(device), indices.to(device))
    return student.to(device, dtype), (teacher.to(device, dtype),)


def options(loss):
    return {"temperature": 2.0} if loss.startswith("distillation") else {}


def call(loss, student, teacher, **more):
    return getattr(quantrain, loss)(student, *teacher, **options(loss), **more)


def expected(loss, student, teacher, mask=None, reduction="mean", **more):
    """The float64 loss, and the gradient of its sum by the student."""
    rows, gradient = reference.LOSSES[loss]
    given = [t.detach().cpu() for t in (student, *teacher)]
    mask = None if mask is None else mask.cpu()
    more = options(loss) | more
    return (
        reference.reduced(rows(*given, **more), mask, reduction),
        reference.reduced_gradient(gradient(*given, **more), mask, reduction),
    )


def agrees(found, want, dtype, student=None):
    """Within the type's rounding, of float16's least number too; a cosine's gradient is a difference of parts of 1 / |s|."""
    parts = 0.0 if student is None else (1 / student.detach().cpu().double().norm(dim=-1)).max()
    room = STEP[dtype] * (want.abs() + 0.1 * want.abs().max()) + 1e-6 * parts + 1e-12
    room = room + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((found.detach().cpu().double() - want).abs() <= room).all(), (
        (found.detach().cpu().double() - want).abs().max()
    )


@DEVICES
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient(device, dtype, shape, loss):
    student, teacher = operands(loss, shape, dtype, device)
    student.requires_grad_()
    found = call(loss, student, teacher)
    want, gradient = expected(loss, student, teacher)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.detach().cpu().double(), want, rtol=2e-5, atol=2e-6)
    found.backward()
    assert student.grad.dtype == dtype and student.grad.shape == student.shape
    agrees(student.grad, gradient, dtype, student if loss == "hidden_cosine" else None)


@DEVICES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_rows_are_not_read(device, loss, reduction):
    student, teacher = operands(loss, (4, 6, 130), device=device)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).to(device) < 0.6
    want, gradient = expected(loss, student, teacher, mask, reduction)
    for kind in (torch.bool, torch.int64, torch.float32):
        poisoned = student.masked_fill(~mask[..., None], float("nan")).requires_grad_()
        found = call(loss, poisoned, teacher, mask=mask.to(kind), reduction=reduction)
        torch.testing.assert_close(found.detach().cpu().double(), want, rtol=2e-5, atol=2e-6)
        found.sum().backward()
        agrees(poisoned.grad, gradient, torch.float32)
        assert (poisoned.grad[~mask] == 0).all()


@DEVICES
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_in_which_nothing_counts_is_zero(device, loss):
    student, teacher = operands(loss, (2, 3, 20), device=device)
    student.requires_grad_()
    found = call(loss, student, teacher, mask=torch.zeros(2, 3, device=device))
    found.backward()
    assert found.item() == 0 and (student.grad == 0).all()
    empty, nothing = operands(loss, (0, 20), device=device)
    assert call(loss, empty.requires_grad_(), nothing).item() == 0


@DEVICES
@pytest.mark.parametrize("loss", ["distillation_kl", "hidden_mse", "hidden_cosine", "attention_kl"])
def test_types_of_student_and_teacher_may_differ(device, loss):
    student, teacher = operands(loss, (3, 700), device=device)
    for own in STEP:
        for other in STEP:
            given, right = student.to(own, copy=True).requires_grad_(), (teacher[0].to(other),)
            found = call(loss, given, right)
            want, gradient = expected(loss, given, right)
            torch.testing.assert_close(found.detach().cpu().double(), want, rtol=2e-5, atol=2e-6)
            found.backward()
            agrees(given.grad, gradient, own, given if loss == "hidden_cosine" else None)


@DEVICES
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_views(device, loss):
    """Shifted logits and other layouts give what their copies give."""
    student, teacher = operands(loss, (3, 9, 70), device=device)
    views = {
        "shifted": lambda t: t[:, :-1],
        "transposed": lambda t: t.transpose(0, 1),
        "steps": lambda t: t[:, ::2, :],
        "columns": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "unaligned": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
        "one row": lambda t: t[1, 2],
    }
    for name, view in views.items():
        given, right = view(student.clone()).requires_grad_(), [view(t) for t in teacher]
        plain = given.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        one, two = call(loss, given, right), call(loss, plain, [t.contiguous() for t in right])
        torch.testing.assert_close(one, two, rtol=2e-6, atol=1e-6, msg=name)  # elements may fall to other threads
        grads = [torch.autograd.grad(result, of)[0] for result, of in ((one, given), (two, plain))]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8, msg=name)


@DEVICES
def test_normalized_by_the_teachers_mean_square(device):
    student, teacher = operands("hidden_mse", (5, 300), device=device)
    teacher[0][1] *= 1e3
    teacher[0][2] = 0
    student.requires_grad_()
    found = quantrain.hidden_mse(student, *teacher, normalize=True)
    want, gradient = expected("hidden_mse", student, teacher, normalize=True)
    torch.testing.assert_close(found.detach().cpu().double(), want, rtol=2e-5, atol=2e-6)
    found.backward()
    agrees(student.grad, gradient, torch.float32)


@DEVICES
@DTYPES
def test_all_columns_stored_is_the_loss_itself(device, dtype):
    student, (teacher,) = operands("distillation_kl", (4, 50), dtype, device)
    values, indices = torch.log_softmax(teacher.float() / 2, -1).topk(50, -1)
    one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
    whole = quantrain.distillation_kl(one, teacher.float(), temperature=2.0)
    stored = quantrain.distillation_kl_topk(two, values, indices.int(), temperature=2.0)
    torch.testing.assert_close(stored, whole, rtol=1e-4, atol=1e-6)
    whole.backward()
    stored.backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=10 * STEP[dtype], atol=1e-6)


@DEVICES
def test_nan_and_infinity(device):
    for loss in LOSSES:
        student, teacher = operands(loss, (3, 600), device=device)
        student[1, 77] = float("nan")
        rows = call(loss, student, teacher, reduction="none")
        assert rows[1].isnan() and rows[[0, 2]].isfinite().all(), loss
        if loss != "distillation_kl_topk":
            student, teacher = operands(loss, (3, 600), device=device)
            teacher[0][2, 5] = float("nan")
            rows = call(loss, student, teacher, reduction="none")
            assert rows[2].isnan() and rows[:2].isfinite().all(), loss
    student, (teacher,) = operands("distillation_kl", (2, 40), device=device)
    both, alone = student.clone(), student.clone()
    both[:, 3:9] = -torch.inf
    shut = teacher.clone()
    shut[:, 3:9] = -torch.inf
    found = quantrain.distillation_kl(both.requires_grad_(), shut)
    left = [i for i in range(40) if not 3 <= i < 9]
    torch.testing.assert_close(found, quantrain.distillation_kl(both[:, left], shut[:, left]))
    found.backward()
    assert both.grad.isfinite().all() and (both.grad[:, 3:9] == 0).all()
    alone[:, 3] = -torch.inf
    assert quantrain.distillation_kl(alone, teacher).isinf()
    assert quantrain.distillation_kl(torch.full((1, 4), -torch.inf, device=device), teacher[:1, :4]).isnan()
    assert quantrain.distillation_kl(torch.full((1, 4), torch.inf, device=device), teacher[:1, :4]).isnan()


@DEVICES
def test_a_stored_index_outside_of_the_vocabulary_is_nan(device):
    student, (values, indices) = operands("distillation_kl_topk", (3, 60), device=device)
    for bad in (60, -1, 2**40):
        wrong = indices.clone()
        wrong[1, 2] = bad
        given = student.clone().requires_grad_()
        rows = quantrain.distillation_kl_topk(given, values, wrong, temperature=2.0, reduction="none")
        assert rows[1].isnan() and rows[[0, 2]].isfinite().all()
        rows.sum().backward()
        assert given.grad[1].isnan().any() and given.grad[[0, 2]].isfinite().all()


@DEVICES
def test_extreme_logits(device):
    """Far apart, and of a size at which float32 sums of exponentials would overflow."""
    student = torch.tensor([[0.0, 300.0, -300.0], [1e4, 1e4 - 1, 1e4 - 2]], device=device)
    teacher = torch.tensor([[300.0, 0.0, -300.0], [-1e4, -1e4, -1e4 + 1]], device=device)
    rows = quantrain.distillation_kl(student, teacher, reduction="none").cpu().double()
    torch.testing.assert_close(rows, reference.kl(student.cpu(), teacher.cpu()), rtol=1e-3, atol=1e-3)


@DEVICES
@pytest.mark.parametrize("loss", LOSSES)
def test_results_repeat_and_the_teacher_is_a_constant(device, loss):
    student, teacher = operands(loss, (64, 3000), torch.bfloat16, device)
    results = []
    for _ in range(2):
        given = student.clone().requires_grad_()
        right = [t.clone().requires_grad_() if t.is_floating_point() else t for t in teacher]
        found = call(loss, given, right)
        found.backward()
        assert all(t.grad is None for t in right)
        results.append((found.detach(), given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_second_derivatives_are_refused():
    student, teacher = operands("distillation_kl", (2, 8))
    student.requires_grad_()
    (grad,) = torch.autograd.grad(quantrain.distillation_kl(student, *teacher), student, create_graph=True)
    with pytest.raises(NotImplementedError, match="_distillation_rows"):
        grad.sum().backward()


@DEVICES
def test_gradcheck_of_a_weighted_sum(device):
    """Each row's own gradient, through a weighted sum of unreduced losses."""
    for loss in LOSSES:
        student, teacher = operands(loss, (5, 40), device=device)
        weights = torch.rand(5, generator=torch.Generator().manual_seed(1)).to(device)
        student.requires_grad_()
        (call(loss, student, teacher, reduction="none") * weights).sum().backward()
        rows = expected(loss, student, teacher, reduction="sum")[1]
        agrees(student.grad, rows * weights.cpu().double()[:, None], torch.float32)


@DEVICES
@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(device, loss):
    student, teacher = operands(loss, (4, 20), device=device)
    mask = torch.tensor([True, False, True, True], device=device)
    kind = {
        "distillation_kl": "kl",
        "distillation_kl_topk": "kl_topk",
        "hidden_mse": "mse",
        "hidden_cosine": "cosine",
        "attention_kl": "attention_kl",
    }[loss]
    values, indices = (teacher[0], teacher[1]) if kind == "kl_topk" else (teacher[0], None)
    rows = (student.clone().requires_grad_(), values, indices, mask)
    opcheck(ops._distillation_rows.default, rows, {"kind": kind, "temperature": 1.5})
    loss_rows, moments = ops._distillation_rows(student, values, indices, mask, kind=kind, temperature=1.5)
    backward = (torch.ones_like(loss_rows), student, values, indices, mask, moments)
    opcheck(ops._distillation_rows_backward.default, backward, {"kind": kind, "temperature": 1.5})
    public = {
        "distillation_kl": ops.distillation_kl,
        "distillation_kl_topk": ops.distillation_kl_topk,
        "hidden_mse": ops.hidden_mse,
        "hidden_cosine": ops.hidden_cosine,
        "attention_kl": ops.attention_kl,
    }[loss]
    # Composite: what a schema without aliases promises, and that it traces.
    opcheck(public.default, (student, *teacher), {"mask": mask}, test_utils=("test_schema", "test_faketensor"))


@DEVICES
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled(device, dynamic, loss):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(student, mask, *teacher):
        return call(loss, student * 1.0, teacher, mask=mask)

    for rows in (4, 9):
        student, teacher = operands(loss, (rows, 30), device=device, seed=rows)
        mask = torch.arange(rows, device=device) % 3 != 1
        one, two = student.clone().requires_grad_(), student.clone().requires_grad_()
        found, want = step(one, mask, *teacher), call(loss, two, teacher, mask=mask)
        torch.testing.assert_close(found, want)
        found.backward()
        want.backward()
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.cuda
def test_captured_and_without_synchronization():
    student, (teacher,) = operands("distillation_kl", (64, 5000), torch.bfloat16, "cuda")
    mask = torch.ones(64, device="cuda")
    student.requires_grad_()

    def step():
        student.grad = None
        loss = quantrain.distillation_kl(student, teacher, temperature=2.0, mask=mask)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step().detach().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    found_grad = student.grad
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.detach(), want) and found_grad.isfinite().all()


@pytest.mark.cuda
def test_no_temporary_of_the_vocabularys_size():
    student, (teacher,) = operands("distillation_kl", (512, 49152), torch.bfloat16, "cuda")
    student.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantrain.distillation_kl(student, teacher).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= student.numel() * student.element_size() + 2**20


REFUSED = [
    ({"teacher": torch.zeros(3, 5)}, ValueError, r"expected teacher of student's shape \[3, 4\], got \[3, 5\]"),
    ({"teacher": torch.zeros(4)}, ValueError, r"expected teacher of student's shape"),
    ({"student": torch.zeros(3, 4).double()}, TypeError, "expected student of float32, float16 or bfloat16"),
    ({"teacher": torch.zeros(3, 4, dtype=torch.int8)}, TypeError, "expected teacher of float32, float16 or bfloat16"),
    ({"mask": torch.ones(4)}, ValueError, r"expected mask \[3\] for student's rows, got \[4\]"),
    ({"mask": torch.ones(3, 1)}, ValueError, "expected mask"),
    ({"mask": torch.ones(3, dtype=torch.complex64)}, TypeError, "expected a dense mask"),
    ({"reduction": "average"}, ValueError, "expected reduction mean, sum or none, got 'average'"),
    ({"teacher": [0.0]}, TypeError, "expected teacher"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
@pytest.mark.parametrize("loss", ["distillation_kl", "hidden_mse", "hidden_cosine", "attention_kl"])
def test_refused(loss, change, error, message):
    given = {"student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=f"{loss}: .*{message}|{loss}: {message}"):
        getattr(quantrain, loss)(given.pop("student"), given.pop("teacher"), **given)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_refused(temperature):
    with pytest.raises(ValueError, match="distillation_kl: expected temperature above 0, got"):
        quantrain.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


@pytest.mark.parametrize(
    ("values", "indices", "error", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.long), ValueError, "at most student's 3 columns"),
        (
            torch.zeros(2, 2),
            torch.zeros(2, 1, dtype=torch.long),
            ValueError,
            "expected teacher_values and teacher_indices",
        ),
        (torch.zeros(2, 2), torch.zeros(2, 2), TypeError, "teacher_indices of int32 or int64"),
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), ValueError, "expected teacher_values"),
    ],
)
def test_stored_teachers_refused(values, indices, error, message):
    with pytest.raises(error, match=f"distillation_kl_topk: .*{message}"):
        quantrain.distillation_kl_topk(torch.zeros(2, 3), values, indices)
