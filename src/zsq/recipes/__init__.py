"""Recipes: one file per method, named after it; the function of the same name is the whole method, top to bottom.

`zsq.recipes.ait` is that function. A new file in this folder is a new recipe: the command line, the listing and the contract
tests find it by looking at the folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from zsq.errors import BadInput


def names() -> list[str]:
    """Names of all recipes, sorted; read from the folder, nothing is imported."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def module(name: str) -> ModuleType:
    """Import the file of recipe `name` (its budgets, its `source`, its docstring).

    Raises:
        BadInput: if there is no such recipe.
    """
    if name not in names():
        raise BadInput(
            "--recipe", expected=f"one of {', '.join(names())}", got=repr(name), fix="See `zsq list recipes`."
        )
    importlib.import_module(f"{__name__}.{name}")
    return sys.modules[f"{__name__}.{name}"]


def load(name: str) -> Callable[..., Any]:
    """Give the recipe function `name(teacher, run, *, ...) -> Outcome`.

    Raises:
        BadInput: if there is no such recipe.
    """
    return getattr(module(name), name)


class _Recipes(ModuleType):
    """The package itself: attribute access gives recipe functions, loaded on first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in names():
            raise AttributeError(f"module {self.__name__!r} has no recipe {name!r}; there are {', '.join(names())}")
        return load(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a loaded submodule to its parent package: bind the recipe function of that name instead.
        super().__setattr__(name, getattr(value, name, value) if isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Recipes
