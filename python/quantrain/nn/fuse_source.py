"""Whether a graph that torch.fx traced shows all that a forward pass does: its source is read for what it would not.

Tracing runs the Python code once, on stand-ins for tensors. What that run does beside operations on them is not in the graph, and
what it decides by is in it as it was: contexts, caught exceptions, types and identities of arguments, random numbers, global
variables, properties, functions with a derivative of their own.
"""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

__all__ = ["attributes_read"]

# Names, of functions and attributes, behind which there is something that a graph does not show.
_HIDDEN = {
    "apply",  # of a torch.autograd.Function
    "autocast",
    "checkpoint",
    "checkpoint_sequential",
    "enable_grad",
    "inference_mode",
    "is_autocast_enabled",
    "is_compiling",
    "is_exporting",
    "is_grad_enabled",
    "is_tracing",
    "item",
    "manual_seed",
    "no_grad",
    "rand",
    "randn",
    "random",
    "set_grad_enabled",
    "tolist",
}
_HIDDEN_STEPS = {
    "BEFORE_WITH",
    "DELETE_ATTR",
    "IMPORT_NAME",
    "LOAD_SPECIAL",
    "PUSH_EXC_INFO",
    "SETUP_FINALLY",
    "SETUP_WITH",
    "STORE_ATTR",
    "STORE_GLOBAL",
    "STORE_SUBSCR",
}
_BUILTINS = {
    *("abs", "bool", "dict", "divmod", "enumerate", "float", "int", "len", "list", "map", "max", "min", "pow", "range"),
    *("reversed", "round", "slice", "sorted", "str", "sum", "super", "tuple", "zip"),
}
_MODULES = {"torch", "math", "operator", "_operator"}


def attributes_read(block: nn.Module) -> set[str] | None:
    """Names of attributes of ``block`` that its written forward pass may read; None where a graph does not show all of it.

    The methods of the block's class and the functions of its module that it calls are read too.
    """
    lineage = type(block).__mro__[: type(block).__mro__.index(nn.Module)]
    if any("__getattr__" in vars(cls) or "__getattribute__" in vars(cls) for cls in lineage):
        return None
    own = {*block.__dict__, *block._modules, *block._parameters, *block._buffers}
    functions, read = [type(block).forward], set()
    for function in functions:
        if not _is_plain(function):
            return None
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        outside = [_value_of(function, name) for name in _outer_names(function)]
        if names & _HIDDEN or not all(_is_shown(value, lineage) for value in outside):
            return None
        inherits = any(value is super or value in lineage for value in outside if inspect.isclass(value))
        found = [value for value in outside if _is_foreign(value)]
        for name in names - own:
            for value in _of_class(lineage, name, inherits):
                if isinstance(value, staticmethod):
                    value = value.__func__
                if isinstance(value, FunctionType):
                    found.append(value)
                elif hasattr(value, "__get__"):  # a property, a class method: code that is not read here
                    return None
                else:
                    read.add(name)
        functions += [value for value in dict.fromkeys(found) if value not in functions]
        read |= names & own
    return read


def _is_plain(function: Any) -> bool:
    """Whether it is a function as written, that leaves no argument out."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):  # decorated
        return False
    if function.__defaults__ or function.__kwdefaults__:
        return False
    if function.__code__.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        return False
    steps = (step for code in _codes(function.__code__) for step in dis.get_instructions(code))
    return not any(step.opname in _HIDDEN_STEPS for step in steps)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions written in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _outer_names(function: FunctionType) -> set[str]:
    """Names that a function takes from outside of itself."""
    steps = (step for code in _codes(function.__code__) for step in dis.get_instructions(code))
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names | (set(function.__code__.co_freevars) - {"__class__"})


def _value_of(function: FunctionType, name: str) -> Any:
    if name in function.__code__.co_freevars:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        return cell.cell_contents if cell != type(cell)() else None
    return function.__globals__.get(name, getattr(builtins, name, None))


def _is_shown(value: Any, lineage: tuple[type, ...]) -> bool:
    """Whether a graph shows what the use of a value from outside does, as far as its own source is plain."""
    if isinstance(value, ModuleType):
        return _is_known(value.__name__)
    if inspect.isclass(value):
        return value in lineage or _is_builtin(value) or _is_known(value.__module__)
    if isinstance(value, FunctionType):
        return value.__name__ not in _HIDDEN
    if isinstance(value, BuiltinFunctionType):
        return _is_builtin(value) or (_is_known(value.__module__) and value.__name__ not in _HIDDEN)
    return False


def _is_known(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _MODULES


def _is_builtin(value: Any) -> bool:
    name = getattr(value, "__name__", "")
    if getattr(builtins, name, None) is not value:
        return False
    return name in _BUILTINS or (inspect.isclass(value) and issubclass(value, BaseException))


def _is_foreign(value: Any) -> bool:
    """Whether it is a function whose source is still to be read."""
    return isinstance(value, FunctionType) and not _is_known(value.__module__)


def _of_class(lineage: tuple[type, ...], name: str, inherits: bool) -> list[Any]:
    """What ``name`` is in a block's class; where its source names a base class, in every one of them."""
    if name != "forward" and hasattr(nn.Module, name):
        return []
    values = [vars(cls)[name] for cls in lineage if name in vars(cls)]
    return values if inherits else values[:1]
