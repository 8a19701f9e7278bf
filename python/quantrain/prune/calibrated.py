"""Masks from weights and data: Wanda and SparseGPT, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantrain._C import QuantSpec
from quantrain.fake_quant import choose_qparams
from quantrain.nn.calibrate import calibrating_modules, check_batches, evaluating, run_batch
from quantrain.nn.prepare import some
from quantrain.nn.ptq import ColumnObserver
from quantrain.pruning import pack_mask, prune_mask, sparsegpt_prune, unpack_mask
from quantrain.ptq.blocks import NoChain, block_names, captured_calls, run_block, without_cache

from .report import SparsityTable, table_of
from .selection import Weight, check_pattern, check_sparsity, prunable_weights, write_masks

__all__ = ["InputNorms", "sparsegpt", "wanda"]

kElements = 1 << 24  # of a convolution's unfolded input at a time

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int, str], None]


def wanda(
    model: nn.Module,
    sparsity: float,
    batches: Iterable[Any],
    *,
    pattern: str = "row",
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    sequential: bool | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> SparsityTable:
    """Zeroes the weights of least ``|w_ij| ||x_j||_2``, x_j column j of what the layer reads over all tokens of the
    batches (Sun et al., arXiv:2306.11695, eq. 1). Weights that stay do not change.

    Of a convolution a column is a place of the kernel in an input channel. Masks, ``layers`` and ``skip`` as in
    :func:`magnitude`; transposed convolutions and nn.MultiheadAttention are left. Under ``torch.distributed`` the
    squared norms are summed over the ranks, so each must call this. The model runs in evaluation mode, a prepared one
    without rounding.

    Args:
        model: in place.
        sparsity: share of the elements to drop, in [0, 1).
        batches: what ``forward`` takes; held while this runs.
        pattern: ``"row"``: that share of each output's row, as published; ``"layer"``; ``"2:4"`` (or another n:m).
        sequential: prune block by block, each on what the pruned blocks before it give, with statistics of one block at a
            time. None: where the model has blocks that run one after the other (:mod:`quantrain.ptq.blocks`); layers
            outside of them come after, together. False: all layers from one pass of the dense model.
        forward: called as ``forward(model, batch)``; by default as in :func:`quantrain.nn.calibrate`.
        progress: called with (stages done, stages, name of the next).

    Returns:
        A row for each pruned weight.

    Raises:
        TypeError: one batch in place of an iterable of them, or as :func:`magnitude`.
        ValueError: as :func:`magnitude`; no batch; a layer that no batch reaches, or reads NaN or Inf, naming it; blocks
            that do not follow one another, with ``sequential=True``. The model is unchanged.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> wanda(model, 0.5, [torch.randn(16, 8)]).total["zeros"]
    20
    """
    weights = _selected("wanda", model, sparsity, pattern, layers, skip)
    masks = wanda_masks("wanda", model, weights, sparsity, batches, pattern, sequential, forward, progress)
    write_masks(masks)
    return table_of(weights)


def wanda_masks(
    op: str,
    model: nn.Module,
    weights: Sequence[Weight],
    sparsity: float,
    batches: Iterable[Any],
    pattern: str = "row",
    sequential: bool | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> dict[Weight, Tensor]:
    """The masks, with the weights as they were."""
    masks: dict[Weight, Tensor] = {}

    def prune(weight: Weight, norms: InputNorms) -> Tensor:
        rows = weight.rows(weight.parameter.detach())
        masks[weight], pruned = _wanda_mask(weight, rows, norms.agreed(), sparsity, pattern)
        return pruned

    with _restoring(weights):
        _in_stages(op, model, weights, InputNorms, prune, batches, sequential, forward, progress)
    return masks


def sparsegpt(
    model: nn.Module,
    sparsity: float,
    batches: Iterable[Any],
    *,
    pattern: str = "layer",
    damping: float = 0.01,
    quantize: QuantSpec | None = None,
    layers: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    sequential: bool | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> SparsityTable:
    """Drops weights and changes the others to make up for it (Frantar and Alistarh, arXiv:2301.00774, algorithm 1).

    With H the mean of ``2 x x^T`` over what the layer reads and ``U^T U = (H + d I)^-1``, column after column drops what
    has the least ``w^2 / U_jj^2`` and spreads its error over the columns to come. Each layer of a block is pruned on what
    the block read when its predecessors were pruned; a block's Hessians (``[K, K]`` float32 per layer) live no longer
    than the block's turn. A grouped convolution has one per group. Masks, ``layers``, ``skip`` as in :func:`magnitude`;
    transposed convolutions and nn.MultiheadAttention are left. Under ``torch.distributed`` the Hessians are averaged over
    the ranks. The model runs in evaluation mode, a prepared one without rounding.

    Args:
        model: in place.
        sparsity: share of the elements to drop, in [0, 1).
        batches: what ``forward`` takes; held while this runs.
        pattern: ``"layer"``: that share of each block of 128 columns, as published; ``"row"``: of each row in it;
            ``"2:4"`` (or another n:m, m a divisor of 128).
        damping: d is this times the mean of H's diagonal, doubled up to ten times where there is no Cholesky factor.
        quantize: a symmetric QuantSpec of weights with one scale per row: weights that stay are rounded to its grid on
            the way, so that later columns make up for that error too. The scale is that of the weight pruned without
            rounding, which a first pass gives; the table's ``scales`` holds it.
        sequential, forward, progress: as in :func:`wanda`.

    Returns:
        A row for each pruned weight.

    Raises:
        TypeError, ValueError: as :func:`wanda`; a Hessian that no damping makes positive definite, naming the layer;
            ``quantize`` of another kind. The model is unchanged.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> sparsegpt(model, 0.5, [torch.randn(64, 8)], pattern="2:4").total["zeros"]
    20
    """
    weights = _selected("sparsegpt", model, sparsity, pattern, layers, skip)
    _check_spec(quantize)
    masks: dict[Weight, Tensor] = {}
    scales: dict[str, Tensor] = {}

    def prune(weight: Weight, hessians: Hessians) -> Tensor:
        rows = weight.rows(weight.parameter.detach())
        matrix = rows.flatten(1)
        solve = partial(_sparsegpt_groups, weight.layer, matrix, hessians.agreed(), sparsity, pattern, damping)
        pruned, mask = solve()
        if quantize is not None:  # the grid of what is left, which may have grown over the dense weight's
            limits = {"quant_min": quantize.quant_min(), "quant_max": quantize.quant_max()}
            scales[weight.name], _ = choose_qparams(pruned, [len(pruned), 1], **limits)
            pruned, mask = solve(scales[weight.name], **limits)
        masks[weight] = weight.mask_from_rows(mask, rows)
        return weight.from_rows(pruned.view_as(rows))

    with _restoring(weights, on_errors_alone=True):
        _in_stages("sparsegpt", model, weights, Hessians, prune, batches, sequential, forward, progress)
    write_masks(masks)
    return table_of(weights, scales)


def _selected(
    op: str, model: nn.Module, sparsity: float, pattern: str, layers: Iterable[str] | None, skip: Iterable[str]
) -> list[Weight]:
    check_sparsity(op, sparsity)
    weights = called_weights(op, model, prunable_weights(op, model, layers, skip))
    check_pattern(op, pattern, sparsity, weights)
    return weights


def called_weights(op: str, model: nn.Module, weights: Sequence[Weight]) -> list[Weight]:
    """Those of layers that are called with what their columns read; ValueError where there are none."""
    inside = {id(child) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}
    called = [weight for weight in weights if weight.calibrates and id(weight.module) not in inside]
    if not called:
        first = weights[0]
        raise ValueError(
            f"{op}: expected a linear layer or a convolution, called with what its columns read, got '{first.layer}' "
            f"({type(first.module).__name__})"
        )
    return called


def _check_spec(spec: QuantSpec | None) -> None:
    if spec is None:
        return
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"sparsegpt: expected quantize to be a QuantSpec, got {type(spec).__name__}")
    if not spec.symmetric or spec.granularity != "per_channel":
        kind = "symmetric" if spec.symmetric else "affine"
        raise ValueError(
            f"sparsegpt: expected quantize to be symmetric with one scale per row, got {kind} {spec.granularity}"
        )


# ---- what a layer reads ----------------------------------------------------------------------------------------------


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    """A convolution's, () of other layers."""
    return tuple(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()


def columns_read(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What each group of the layer's weight is multiplied with: ``[..., K]``, of a convolution ``[..., C, *kernel]``."""
    kernel = kernel_of(module)
    if not kernel:
        yield x
        return
    spatial = len(kernel)
    x = x if x.dim() == spatial + 2 else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, dilation, stride) in enumerate(zip(kernel, module.dilation, module.stride, strict=True), start=2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # [N, C, *places, *kernel] -> [N, *places, C, *kernel], a view
    x = x.movedim(1, spatial + 1)
    yield from x.chunk(module.groups, dim=spatial + 1)


class Statistic:
    """What a layer's inputs add up to."""

    def __init__(self, weight: Weight):
        self.weight, self.calls = weight, 0

    def add(self, x: Tensor) -> None:
        self.calls += 1
        for index, group in enumerate(columns_read(self.weight.module, x.detach())):
            self._add(index, group)

    def _add(self, index: int, x: Tensor) -> None:
        raise NotImplementedError

    def finite(self) -> bool:
        raise NotImplementedError


class InputNorms(Statistic):
    """||x_j||_2 of every column, float32, one tensor per group of the layer, ``[K]`` or ``[C, *kernel]``."""

    def __init__(self, weight: Weight):
        super().__init__(weight)
        self.norms: list[Tensor | None] = [None] * weight.groups

    def _add(self, index: int, x: Tensor) -> None:
        kernel = kernel_of(self.weight.module)
        x = x.double() if x.dtype == torch.float64 else x.float()
        leading = tuple(range(x.dim() - 1 - len(kernel)))
        norm = (torch.linalg.vector_norm(x, dim=leading) if leading else x.abs()).float()
        before = self.norms[index]
        self.norms[index] = norm if before is None else torch.hypot(before, norm)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(norm).all()) for norm in self.norms)

    def agreed(self) -> list[Tensor]:
        """The norms over all ranks."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for index, norm in enumerate(self.norms):
                squares = norm.square()
                torch.distributed.all_reduce(squares)
                self.norms[index] = squares.sqrt()
        return self.norms


class Hessians(Statistic):
    """The mean of ``2 x x^T``, one ``[K, K]`` per group of the layer."""

    def __init__(self, weight: Weight):
        super().__init__(weight)
        columns = weight.rows(weight.parameter.detach())[:1].numel()
        device = weight.parameter.device
        self.observers = [ColumnObserver(columns, with_hessian=True, device=device) for _ in range(weight.groups)]
        for observer in self.observers:
            observer.begin_calibration()

    def _add(self, index: int, x: Tensor) -> None:
        kernel = kernel_of(self.weight.module)
        samples = max(1, kElements * len(x) // max(x.numel(), 1))
        for part in x.split(samples) if kernel else (x,):
            rows = part.flatten(-1 - len(kernel)) if kernel else part
            self.observers[index](rows.float() if rows.dtype == torch.float64 else rows)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(observer.absmax).all()) for observer in self.observers)

    def agreed(self) -> list[Tensor]:
        for observer in self.observers:
            observer.agree()
        return [observer.hessian for observer in self.observers]


# ---- what is done with it --------------------------------------------------------------------------------------------


def _wanda_mask(
    weight: Weight, rows: Tensor, norms: Sequence[Tensor], sparsity: float, pattern: str
) -> tuple[Tensor, Tensor]:
    """(the packed mask, the pruned weight)."""
    if len(norms) == 1:
        mask = prune_mask(rows, norms[0].flatten(), sparsity=sparsity, pattern=pattern)
    else:  # each group of rows reads columns of its own
        of_rows = torch.stack(list(norms)).repeat_interleave(len(rows) // len(norms), 0)
        mask = prune_mask(rows.float() * of_rows, sparsity=sparsity, pattern=pattern)
    pruned = rows.masked_fill(~unpack_mask(mask, rows.shape), 0)
    return weight.mask_from_rows(mask, rows), weight.from_rows(pruned)


def _sparsegpt_groups(
    layer: str,
    matrix: Tensor,
    hessians: Sequence[Tensor],
    sparsity: float,
    pattern: str,
    damping: float,
    scale: Tensor | None = None,
    **limits: int,
) -> tuple[Tensor, Tensor]:
    """(the weight ``[O, K]``, its packed mask)."""
    parts, masks = [], []
    rows = matrix.chunk(len(hessians))
    scales = [None] * len(rows) if scale is None else scale.chunk(len(hessians))
    for part, hessian, own in zip(rows, hessians, scales, strict=True):
        try:
            pruned, mask = sparsegpt_prune(
                part.contiguous(),
                hessian,
                sparsity=sparsity,
                pattern=pattern,
                damping=damping,
                scale=None if own is None else own.contiguous(),
                **limits,
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            reason = str(error).removeprefix("sparsegpt_prune: ")
            raise ValueError(f"sparsegpt: layer '{layer}': {reason}") from error
        parts.append(pruned)
        masks.append(mask)
    if len(parts) == 1:
        return parts[0], masks[0]
    kept = torch.cat([unpack_mask(mask, part.shape) for mask, part in zip(masks, parts, strict=True)])
    return torch.cat(parts), pack_mask(kept)


# ---- the passes ------------------------------------------------------------------------------------------------------


@contextmanager
def _restoring(weights: Sequence[Weight], on_errors_alone: bool = False) -> Iterator[None]:
    """Afterwards the weights are what they were; copies wait in host memory."""
    saved = [(weight.parameter, weight.parameter.detach().to("cpu", copy=True)) for weight in weights]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in saved:
            parameter.copy_(value)

    try:
        yield
    except BaseException:
        restore()
        raise
    if not on_errors_alone:
        restore()


@torch.no_grad()
def _in_stages(
    op: str,
    model: nn.Module,
    weights: Sequence[Weight],
    statistic: type[Statistic],
    prune: Callable[[Weight, Any], Tensor],
    batches: Iterable[Any],
    sequential: bool | None,
    forward: Forward | None,
    progress: Progress | None,
) -> None:
    """For one block after the other, then for all other layers: statistics of what they read, then ``prune``'s weights
    in their place."""
    check_batches(op, batches)
    batches, forward = list(batches), forward or run_batch
    if not batches:
        raise ValueError(f"{op}: expected at least one batch, got none")
    with running(model):
        chain = None if sequential is False else _chain(op, model, batches, forward, sequential is True)
        left = list(weights)
        hidden, calls, blocks = chain or ([], [], {})
        for index, (name, block) in enumerate(blocks.items()):
            inside = {id(module) for module in block.modules()}
            mine = [weight for weight in left if id(weight.module) in inside]
            left = [weight for weight in left if id(weight.module) not in inside]
            if progress is not None:
                progress(index, len(blocks) + bool(left), name)
            pairs = list(zip(hidden, calls[index], strict=True))
            _stage(op, mine, statistic, prune, lambda block=block, p=pairs: [run_block(block, x, c) for x, c in p])
            hidden = [run_block(block, x, call) for x, call in pairs]
        if left:
            if progress is not None:
                progress(len(blocks), len(blocks) + 1, left[0].layer)
            _stage(op, left, statistic, prune, lambda: [forward(model, batch) for batch in batches])


def _chain(
    op: str, model: nn.Module, batches: Sequence[Any], forward: Forward, asked: bool
) -> tuple[list[Tensor], list, dict[str, nn.Module]] | None:
    """The first block's inputs, all blocks' other arguments, and the blocks; None where there is no chain of them."""
    modules = dict(model.named_modules())
    blocks = {name: modules[name] for name in block_names(model)}
    if not blocks:
        if asked:
            raise ValueError(f"{op}: expected blocks (an nn.ModuleList of one class) with sequential=True, got none")
        return None
    try:
        return (*captured_calls(model, list(blocks.values()), batches, forward), blocks)
    except NoChain as error:
        if asked:
            raise ValueError(str(error).replace("quantize:", f"{op}:", 1)) from error
        return None


def _stage(
    op: str,
    weights: Sequence[Weight],
    statistic: type[Statistic],
    prune: Callable[[Weight, Any], Tensor],
    run: Callable[[], Any],
) -> None:
    seen = observed(weights, statistic, run)
    missing = [weight.layer for weight in weights if not seen[weight].calls]
    if missing:
        raise ValueError(
            f"{op}: expected every layer to be called by a batch, got none for {some(map(repr, missing))} (skip=[...] leaves "
            "them dense)"
        )
    for weight in weights:
        found = seen.pop(weight)
        if not found.finite():
            raise ValueError(f"{op}: layer '{weight.layer}': expected finite inputs, got NaN or Inf")
        weight.parameter.copy_(prune(weight, found))


def observed(weights: Sequence[Weight], statistic: type[Statistic], run: Callable[[], Any]) -> dict[Weight, Any]:
    """``run()`` with a statistic of each weight's module's input."""
    seen = {weight: statistic(weight) for weight in weights}
    with ExitStack() as hooks:
        for weight, found in seen.items():
            for module, _ in weight.owners:  # of tied ones, every owner reads columns of its own
                handle = module.register_forward_pre_hook(_adding(found), with_kwargs=True)
                hooks.callback(handle.remove)
        run()
    return seen


def _adding(found: Statistic) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        found.add(x if isinstance(x, Tensor) else x.values)  # of a prepared model, codes with their values

    return hook


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, caches, rounding, and PyTorch's fused encoder, which calls no layer."""
    switches = [(module, module.fake_quant_enabled) for module in calibrating_modules(model)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for module, _ in switches:
        module.enable_fake_quant(False)
    try:
        with evaluating(model), without_cache(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, rounds in switches:
            module.enable_fake_quant(rounds)
