"""AdamW with moments of 8 bits a number, as a torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from quantrain.adamw_8bit import adamw_8bit_, dequantize_8bit_blockwise, quantize_8bit_blockwise
from quantrain.optim.host_state import HostState, pinned
from quantrain.pruning import check_mask

__all__ = ["AdamW8bit"]

_BLOCK = 256  # elements of a scale
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SIGNED_ZERO = 127  # the code of 0 in exp_avg's map
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether its map has a sign
# bitsandbytes' names of a moment, of its scale and of its map.
_BITSANDBYTES = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
_BITSANDBYTES_WRAPPED = "__bnb_optimizer_quant_state__"  # where later versions put the tensors of a state
_SHARED_OPTIONS = ("lr", "betas", "eps", "weight_decay")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments take 8 bits a number: 2.03 bytes an element in place of 8.

    The step of :func:`quantrain.adamw_8bit_`: one fused kernel for all parameters of a group, without host
    synchronization, on CPU and CUDA bit for bit alike. The state is plain tensors by parameter: ``exp_avg``,
    ``exp_avg_sq`` (uint8 codes of the parameter's shape), ``exp_avg_scale``, ``exp_avg_sq_scale`` (float32, one per 256
    elements of the parameter's memory) and ``step``. Works with :class:`quantrain.amp.GradScaler` and
    ``torch.amp.GradScaler``, which leave unscaling and skipping to the step, and in CUDA graphs, where ``lr`` has to be
    a tensor to change.

    Args:
        params: Parameters or groups of them; float32, float16 or bfloat16. A group may set every option for itself.
        lr: A number, or a float32 tensor of one element.
        betas: Decay of the first and the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: The parameter is multiplied by 1 - lr * weight_decay before it moves.
        bits: 8; or 32: the group's moments are float32, as embeddings need.
        min_8bit_size: Parameters of fewer elements have float32 moments.
        stochastic_rounding: Round bfloat16 parameters up or down at random, so that they are on average what float32
            would be: to nearest, an update below half a step of the parameter is lost.
        generator: Where those random numbers come from; None: PyTorch's default generator of the device.
        state_on_host: Keep the moments of parameters on a GPU in pinned host memory, for states larger than the GPU. A
            step copies them in and out page by page beside the update, bound by the host's link: 4.06 bytes an element
            both ways. The same numbers. No capture in CUDA graphs. ``state_dict()`` waits for the copies; who reads
            ``state`` itself synchronizes first.

    Raises:
        ValueError: An option outside its range; in ``step`` a sparse gradient.
        TypeError: In ``step`` another element type.

    Source: Dettmers, Lewis, Shleifer, Zettlemoyer, arXiv:2110.02861; Loshchilov and Hutter, arXiv:1711.05101.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
        >>> groups = [{"params": model[0].parameters(), "bits": 32}, {"params": model[1].parameters()}]
        >>> optimizer = AdamW8bit(groups, lr=1e-3)
        >>> model(torch.arange(10)).square().mean().backward()
        >>> optimizer.step()
        >>> [optimizer.state[p]["exp_avg"].dtype for p in (model[0].weight, model[1].weight, model[1].bias)]
        [torch.float32, torch.uint8, torch.float32]
    """

    _step_supports_amp_scaling = True  # PyTorch's protocol: grad_scale and found_inf are attributes during a step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 8,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        generator: Generator | None = None,
        state_on_host: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bits": bits,
            "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding,
        }
        _check(defaults)
        self._generator, self._state_on_host = generator, state_on_host
        self._hosts: dict[torch.device, HostState] = {}
        self._lrs: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        self._masks: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_state_on_host": self._state_on_host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._generator, self._lrs, self._hosts = None, {}, {}
        self.__dict__.setdefault("_masks", {})  # load_state_dict comes here too: masks stay
        self.__dict__.setdefault("_state_on_host", False)
        for parameter, held in self.state.items():
            self.state[parameter] = self._placed(parameter, held)

    def set_masks(self, masks: Mapping[Tensor, Tensor | None]) -> None:
        """From the next step on, what a mask drops of its parameter is 0 after each step, with its moments, whatever the
        gradient, in the step's own pass.

        Masks are packed as :func:`quantrain.pack_mask` packs them, and read at each step; None ends a parameter's. They are
        not part of ``state_dict()``: masks belong to the model.

        Raises:
            ValueError: A parameter that this optimizer does not have, or a mask of another size; nothing is changed.
            TypeError: A mask of another type or device.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
            >>> optimizer = AdamW8bit([weight], lr=0.1)
            >>> optimizer.set_masks({weight: torch.tensor([1], dtype=torch.uint8)})
            >>> weight.sum().backward()
            >>> optimizer.step()
            >>> weight[1].item()
            0.0
        """
        own = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter, mask in masks.items():
            if parameter not in own:
                raise ValueError(
                    f"AdamW8bit.set_masks: expected a parameter of this optimizer, got another of shape {list(parameter.shape)}"
                )
            if mask is not None:
                check_mask("AdamW8bit.set_masks", parameter, mask)
        merged = {**self._masks, **masks}
        self._masks = {parameter: mask for parameter, mask in merged.items() if mask is not None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's; ValueError for an option outside its range."""
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for index, group in enumerate(self.param_groups):
            by_device: dict[torch.device, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_device.setdefault(parameter.device, []).append(parameter)
            for device, parameters in by_device.items():
                self._step_group(group, parameters, self._lr_on(index, device))
        return loss

    def _check_gradients(self) -> None:
        """Before anything is changed, of every group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout != torch.strided:
                    raise ValueError(f"AdamW8bit: expected dense gradients, got layout {parameter.grad.layout}")
                for name, tensor in (("parameters", parameter), ("gradients", parameter.grad)):
                    if tensor.dtype not in _TYPES:
                        raise TypeError(
                            f"AdamW8bit: expected {name} of float32, float16 or bfloat16, got {tensor.dtype}"
                        )

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor], lr: Tensor) -> None:
        grads = [parameter.grad for parameter in parameters]
        states = [self._state_of(parameter, group) for parameter in parameters]
        if self._state_on_host and lr.is_cuda:
            host = self._hosts.setdefault(lr.device, HostState(lr.device))
            host.update(states, lambda page, held: self._run(group, parameters[page], grads[page], held, lr))
        else:
            self._run(group, parameters, grads, states, lr)

    def _run(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: Tensor,
    ) -> None:
        none = lr.new_empty(0)
        beta1, beta2 = group["betas"]
        adamw_8bit_(
            parameters,
            grads,
            [state["exp_avg"] for state in states],
            [state.get("exp_avg_scale", none) for state in states],
            [state["exp_avg_sq"] for state in states],
            [state.get("exp_avg_sq_scale", none) for state in states],
            [state["step"] for state in states],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            masks=self._masks_of(parameters),
            stochastic=group["stochastic_rounding"],
            generator=self._generator,
        )

    def _masks_of(self, parameters: list[Tensor]) -> list[Tensor]:
        if not any(parameter in self._masks for parameter in parameters):
            return []
        none = torch.empty(0, dtype=torch.uint8, device=parameters[0].device)
        return [self._masks.get(parameter, none) for parameter in parameters]

    def _lr_on(self, index: int, device: torch.device) -> Tensor:
        """The group's learning rate as the operator takes it. A number is written to the device where it changed."""
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor):
            return lr.detach().to(device, torch.float32)
        value, tensor = self._lrs.get((index, device), (None, None))
        if tensor is None:
            tensor = torch.full((), lr, dtype=torch.float32, device=device)
        elif value != lr:
            tensor.fill_(lr)
        self._lrs[index, device] = (lr, tensor)
        return tensor

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, of zeros where it has none yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name, signed in _MOMENTS.items():
                if _has_codes(parameter, group):
                    zero = _SIGNED_ZERO if signed else 0
                    state[name] = torch.full_like(parameter, zero, dtype=torch.uint8, requires_grad=False)
                    blocks = -(-parameter.numel() // _BLOCK)
                    state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
                else:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            self.state[parameter] = state = self._placed(parameter, state)
        return state

    # ---- state ----

    def _placed(self, parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state where it is kept: moments in pinned memory under state_on_host, the step with the parameter."""
        if not (self._state_on_host and parameter.is_cuda):
            return state
        return {
            name: tensor if name == "step" or not isinstance(tensor, Tensor) or tensor.is_pinned() else pinned(tensor)
            for name, tensor in state.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's; waits for what is on its way to the host."""
        for host in self._hosts.values():
            host.synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class, or of torch.optim.AdamW, whose moments are rounded to codes here.

        Moments change between 8 and 32 bits where the groups' options ask for it.

        Raises:
            ValueError: Groups or shapes differ.
        """
        groups = []
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for option in ("maximize", "amsgrad"):
                if saved.get(option):
                    raise ValueError(f"AdamW8bit.load_state_dict: expected a state without {option}, got one with it")
            given = {name: saved.get(name, value) for name, value in own.items() if name != "params"}
            _check(given)
            groups.append(given | {"params": saved["params"]})
        states = {
            parameter: _state_from(
                parameter,
                groups[self._group_index(parameter)],
                saved.get("step", 0.0),
                {name: _moment_of(saved, name) for name in _MOMENTS},
            )
            for parameter, saved in self._by_parameter(state_dict)
        }
        # Casts what it loads to the parameter's type: the state below takes its place.
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})
        for parameter, state in states.items():
            self.state[parameter] = self._placed(parameter, state)

    @torch.no_grad()
    def load_bitsandbytes_state(self, state_dict: dict[str, Any]) -> None:
        """Take over the ``state_dict()`` of bitsandbytes' AdamW8bit or AdamW: codes and scales as they are.

        Blocks of 256 and of a multiple of it (2048 before bitsandbytes 0.44). Codes of another map are rounded anew.
        Of the groups, lr, betas, eps and weight_decay are taken over.

        Raises:
            ValueError: Groups or shapes differ, or a state without moments.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"AdamW8bit.load_bitsandbytes_state: expected {len(self.param_groups)} parameter groups, got "
                f"{len(state_dict['param_groups'])}"
            )
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            _check(own | {name: saved[name] for name in _SHARED_OPTIONS if name in saved})
        states = {}
        for parameter, saved in self._by_parameter(state_dict):
            flat = saved | saved.get(_BITSANDBYTES_WRAPPED, {})
            moments = {name: _moment_from_bitsandbytes(flat, name) for name in _MOMENTS}
            states[parameter] = _state_from(parameter, self._group_of(parameter), flat.get("step", 0), moments)
        for parameter, state in states.items():
            self.state[parameter] = self._placed(parameter, state)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: saved[name] for name in _SHARED_OPTIONS if name in saved})

    @torch.no_grad()
    def to_bitsandbytes_state(self) -> dict[str, Any]:
        """The state as bitsandbytes' AdamW8bit.load_state_dict takes it: state1, state2, absmax1, absmax2, qmap1, qmap2
        and step by parameter. Waits for the device: bitsandbytes counts steps on the host."""
        state_dict = self.state_dict()
        states = {}
        for parameter, key in self._keys(state_dict["param_groups"]):
            if key not in state_dict["state"]:
                continue
            saved = state_dict["state"][key]
            states[key] = {"step": int(saved["step"])}
            for name, signed in _MOMENTS.items():
                codes, absmax, qmap = _BITSANDBYTES[name]
                if saved[name].dtype != torch.uint8:
                    states[key][codes] = saved[name].contiguous()
                    continue
                if parameter.is_contiguous():
                    pair = saved[name], saved[f"{name}_scale"]
                else:  # bitsandbytes' blocks go by rows
                    pair = quantize_8bit_blockwise(_moment_of(saved, name).values(parameter), signed=signed)
                states[key] |= {codes: pair[0], absmax: pair[1], qmap: _map(signed, parameter.device)}
        more = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
        groups = [
            {name: group[name] for name in (*_SHARED_OPTIONS, "params")} | more for group in state_dict["param_groups"]
        ]
        return {"state": states, "param_groups": groups}

    def _group_index(self, parameter: Tensor) -> int:
        return next(i for i, group in enumerate(self.param_groups) if any(parameter is p for p in group["params"]))

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        return self.param_groups[self._group_index(parameter)]

    def _keys(self, groups: list[dict[str, Any]]) -> Iterable[tuple[Tensor, Any]]:
        """Each parameter with its key in a state of these groups; ValueError where their sizes differ."""
        for own, saved in zip(self.param_groups, groups, strict=True):
            if len(own["params"]) != len(saved["params"]):
                raise ValueError(
                    f"AdamW8bit: expected a group of {len(own['params'])} parameters, got {len(saved['params'])}"
                )
            yield from zip(own["params"], saved["params"], strict=True)

    def _by_parameter(self, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        for parameter, key in self._keys(state_dict["param_groups"]):
            if key in state_dict["state"]:
                yield parameter, state_dict["state"][key]


# ---- moments ----


@dataclass(frozen=True)
class _Moment:
    """A moment as a file has it.

    Attributes:
        signed: Whether its map has a sign.
        data: float values, or uint8 codes.
        scale: float32, one per 256 elements; None beside values.
        table: float32 [256], where the codes are not of our map.
        row_major: Whether the runs of the scales are in row-major order whatever the parameter's memory.
    """

    signed: bool
    data: Tensor
    scale: Tensor | None = None
    table: Tensor | None = None
    row_major: bool = False

    def values(self, parameter: Tensor) -> Tensor:
        """float32 of the parameter's shape and memory."""
        result = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
        if self.scale is None:
            return result.copy_(self.data)
        codes, scale = self.data.to(parameter.device), self.scale.to(parameter.device)
        codes = codes.reshape(-1) if self.row_major else _in_memory(_arranged(codes, parameter))
        if self.table is None:
            decoded = dequantize_8bit_blockwise(codes, scale, signed=self.signed)
        else:
            decoded = self.table.to(parameter.device)[codes.long()]
            decoded *= scale.repeat_interleave(_BLOCK)[: codes.numel()]
        if self.row_major:
            return result.copy_(decoded.view(parameter.shape))
        _in_memory(result).copy_(decoded)
        return result

    def codes(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 of the parameter's shape and memory, and scales: those that it has where they are of our kind."""
        same_runs = not self.row_major or parameter.is_contiguous()
        if self.scale is not None and self.table is None and same_runs:
            return _arranged(self.data, parameter), self.scale.to(parameter.device, torch.float32, copy=True)
        flat, scale = quantize_8bit_blockwise(_in_memory(self.values(parameter)), signed=self.signed)
        codes = torch.empty_like(parameter, dtype=torch.uint8, requires_grad=False)
        _in_memory(codes).copy_(flat)
        return codes, scale


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory: a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _arranged(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy on the parameter's device with its memory's order."""
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _moment_of(saved: dict[str, Tensor], name: str) -> _Moment:
    """Of a state of AdamW8bit, or of torch.optim.AdamW."""
    if name not in saved:
        raise ValueError(f"AdamW8bit.load_state_dict: expected a state with {name}, got {sorted(map(str, saved))}")
    if saved[name].dtype == torch.uint8 and f"{name}_scale" not in saved:
        raise ValueError(f"AdamW8bit.load_state_dict: expected {name}_scale beside codes of {name}, got none")
    return _Moment(_MOMENTS[name], saved[name], saved.get(f"{name}_scale"))


def _moment_from_bitsandbytes(saved: dict[str, Any], name: str) -> _Moment:
    data, absmax, qmap = (saved.get(key) for key in _BITSANDBYTES[name])
    signed = _MOMENTS[name]
    if data is None:
        raise ValueError(
            f"AdamW8bit.load_bitsandbytes_state: expected a state with {_BITSANDBYTES[name][0]}, got {sorted(saved)}"
        )
    if data.dtype != torch.uint8:
        return _Moment(signed, data)
    if absmax is None or qmap is None or qmap.numel() != 256:
        raise ValueError(
            f"AdamW8bit.load_bitsandbytes_state: expected {_BITSANDBYTES[name][1]} and a map of 256 values beside codes, got "
            f"{sorted(map(str, saved))}"
        )
    blocks = -(-data.numel() // _BLOCK)
    size = next((n for n in (_BLOCK << i for i in range(8)) if -(-data.numel() // n) == absmax.numel()), 0)
    if not size:
        raise ValueError(
            f"AdamW8bit.load_bitsandbytes_state: expected a scale for {_BLOCK} elements of {data.numel()}, or for a "
            f"multiple of it by a power of two, got {absmax.numel()} scales"
        )
    scale = absmax.float().repeat_interleave(size // _BLOCK)[:blocks]
    ours = torch.allclose(qmap.float(), _map(signed, qmap.device), rtol=1e-5, atol=1e-9)
    return _Moment(signed, data, scale, None if ours else qmap.float(), row_major=True)


def _state_from(parameter: Tensor, group: dict[str, Any], step: Any, moments: dict[str, _Moment]) -> dict[str, Tensor]:
    """The parameter's state from moments of any kind."""
    steps = torch.as_tensor(step, dtype=torch.float32).reshape(()).to(parameter.device, copy=True)
    state = {"step": steps}
    for name, moment in moments.items():
        if moment.data.shape != parameter.shape:
            raise ValueError(
                f"AdamW8bit: expected {name} of shape {list(parameter.shape)}, got {list(moment.data.shape)}"
            )
        if _has_codes(parameter, group):
            state[name], state[f"{name}_scale"] = moment.codes(parameter)
        else:
            state[name] = moment.values(parameter)
    return state


def _has_codes(parameter: Tensor, group: dict[str, Any]) -> bool:
    return group["bits"] == 8 and parameter.numel() >= group["min_8bit_size"]


def _map(signed: bool, device: torch.device) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return dequantize_8bit_blockwise(codes, torch.ones(1, device=device), signed=signed)


def _check(options: dict[str, Any]) -> None:
    """Numbers in their ranges; a tensor's value is not looked at, since that would wait for the device."""
    lr, betas = options["lr"], tuple(options["betas"])
    if len(betas) != 2:
        raise ValueError(f"AdamW8bit: expected two betas, got {betas}")
    beta1, beta2 = betas
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"AdamW8bit: expected lr with one element, got shape {list(lr.shape)}")
    elif not lr >= 0:
        raise ValueError(f"AdamW8bit: expected lr >= 0, got {lr}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"AdamW8bit: expected betas in [0, 1), got {beta1} and {beta2}")
    for name in ("eps", "weight_decay", "min_8bit_size"):
        if not options[name] >= 0:
            raise ValueError(f"AdamW8bit: expected {name} >= 0, got {options[name]}")
    if options["bits"] not in (8, 32):
        raise ValueError(f"AdamW8bit: expected bits of 8 or 32, got {options['bits']}")
