"""The examples in the docstrings of quantrain, its nn, its amp and its optim run and print what they say, and every public name
has a docstring.
"""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import quantrain
import quantrain.amp
import quantrain.nn
import quantrain.optim

PACKAGES = (quantrain.amp, quantrain.distill, quantrain.nn, quantrain.optim, quantrain.prune)
MODULES = sorted(
    f"{package.__name__}.{m.name}"
    for package in (quantrain, *PACKAGES)
    for m in pkgutil.iter_modules(package.__path__)
    if not m.ispkg and m.name != "_C"
)
NAMES = [(package, name) for package in PACKAGES for name in package.__all__]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_names_are_documented(package, name):
    assert len(inspect.getdoc(getattr(package, name)) or "") > 20
