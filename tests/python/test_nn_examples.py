"""The examples in quantrain.nn's docstrings run and print what they say, and every public name has one docstring."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import quantrain.nn as qnn

MODULES = sorted(module.name for module in pkgutil.iter_modules(qnn.__path__))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"quantrain.nn.{name}"), optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize("name", qnn.__all__)
def test_public_names_are_documented(name):
    assert len(inspect.getdoc(getattr(qnn, name)) or "") > 20
