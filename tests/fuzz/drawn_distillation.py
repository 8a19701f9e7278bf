"""Drawn tests of the distillation family: losses and gradients of rows in every layout against float64."""

import torch
from draw import Draw, check, close, drawn
from reference import distillation as reference

ops = torch.ops.quantrain
STEP = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KINDS = ("normal", "normal", "ties", "zero", "constant")
LOSSES = ("distillation_kl", "hidden_mse", "hidden_cosine", "attention_kl")


def mask_of(d: Draw, shape):
    """None, or of bool or numbers, in a drawn layout."""
    if d.chance(0.4):
        return None
    kept = d.integers(shape, 0, 1, torch.bool)
    return kept if d.chance(0.5) else d.integers(shape, -1, 2, d.choice((torch.int64, torch.uint8, torch.float32)))


def compare(d: Draw, name, given, options, want, gradient, mask, reduction):
    """On each device: the loss within float32's rounding of its terms, the gradient within the type's."""
    student = given[0]
    size = float(student.double().abs().max()) if student.numel() else 0.0
    for device in d.devices:
        placed = [d.on(device, t) for t in given]
        placed[0] = placed[0].detach().requires_grad_()
        on = None if mask is None else d.on(device, mask)
        found = getattr(ops, name)(*placed, mask=on, reduction=reduction, **options)
        check(found.dtype == torch.float32, "expected a loss of float32")
        temperature = options.get("temperature", 1.0)
        terms = (1.0 + size * (size if name == "hidden_mse" else 1.0)) * max(temperature, temperature**2)
        many = 1.0 if reduction == "mean" else max(want.numel(), student[..., 0].numel())
        close(found.detach(), want, 2e-5 * want.abs() + 2e-6 * terms * many, f"{name} on {device}")
        (grad,) = torch.autograd.grad(found.sum(), placed[0])
        check(grad.shape == student.shape and grad.dtype == student.dtype, "expected a gradient like the student")
        scale = gradient.abs().max() if gradient.numel() else 0.0
        # A cosine's gradient is a difference of parts of 1 / |s|, a divergence's of probabilities times the temperature.
        norm = student.double().norm(dim=-1, keepdim=True)
        parts = torch.where(norm == 0, 0.0, 1 / norm) if name == "hidden_cosine" else temperature
        room = STEP[student.dtype] * (gradient.abs() + 0.1 * scale) + 1e-6 * parts + 1e-7
        if student.dtype == torch.float16:
            room = room + 2.0**-24
            room = torch.where(gradient.abs() > 65000, torch.inf, room)  # which it holds as infinity
        close(
            grad.double().clamp(-1e30, 1e30) if student.dtype == torch.float16 else grad,
            gradient,
            room,
            f"gradient of {name} on {device}",
        )


def drawn_loss(name):
    @drawn(name, *(("_distillation_rows", "_distillation_rows_backward") if name == "distillation_kl" else ()))
    def loss(d: Draw):
        shape = d.shape(low=1, empty=0.0)
        student, teacher = (d.tensor(shape, d.dtype(), d.choice(KINDS)) for _ in range(2))
        if name == "attention_kl":
            student, teacher = (
                torch.empty_like(t).copy_(torch.softmax(t.float(), -1)) for t in (student.clone(), teacher.clone())
            )
        mask, reduction = mask_of(d, shape[:-1]), d.choice(("mean", "sum", "none"))
        options = {"temperature": d.choice((0.5, 1.0, 2.0, 4.0))} if name == "distillation_kl" else {}
        if name == "hidden_mse":
            options["normalize"] = d.chance(0.4)
        d.notes |= options | {"student": student, "teacher": teacher, "mask": mask, "reduction": reduction}
        rows, gradient = reference.LOSSES[name]
        compare(
            d,
            name,
            [student, teacher],
            options,
            reference.reduced(rows(student, teacher, **options), mask, reduction),
            reference.reduced_gradient(gradient(student, teacher, **options), mask, reduction),
            mask,
            reduction,
        )

    return loss


for _name in LOSSES:
    drawn_loss(_name)


@drawn("distillation_kl_topk")
def topk(d: Draw):
    shape = d.shape(low=1, empty=0.0)
    student, temperature = d.tensor(shape, d.dtype(), d.choice(KINDS)), d.choice((0.5, 1.0, 2.0))
    teacher = torch.log_softmax(d.tensor(shape, kind=d.choice(KINDS)) / temperature, -1)
    values, indices = teacher.topk(d.randint(1, shape[-1]), -1)
    values = values.to(d.dtype())
    indices = indices.to(d.choice((torch.int32, torch.int64)))
    mask, reduction = mask_of(d, shape[:-1]), d.choice(("mean", "sum", "none"))
    options = {"temperature": temperature}
    d.notes |= options | {"student": student, "values": values, "mask": mask, "reduction": reduction}
    compare(
        d,
        "distillation_kl_topk",
        [student, values, indices],
        options,
        reference.reduced(reference.kl_topk(student, values, indices, **options), mask, reduction),
        reference.reduced_gradient(reference.kl_topk_gradient(student, values, indices, **options), mask, reduction),
        mask,
        reduction,
    )
