"""Networks of others: a user's own file, timm, pytorchcv. Packages are imported when asked for."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from zsq.errors import BadInput
from zsq.teachers.facts import Facts, read_facts

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL = 'pip install "zsq[vision]"'


class Found(NamedTuple):
    """A network as somebody else built it.

    Attributes:
        net: the network; with its own trained weights if those were asked for.
        facts: what its origin says about it.
        unused: beginnings of the names of weights that a file may hold and the network does not need.
    """

    net: nn.Module
    facts: Facts
    unused: tuple[str, ...] = ()


def from_file(text: str) -> Found:
    """Build the network that ``FILE.py:CALLABLE`` names; runs that file.

    Args:
        text: a Python file and the name of a function or class in it that needs no arguments.

    Returns:
        The network, and the facts of the file's dictionary ``ZSQ`` if it has one.

    Raises:
        BadInput: if the file or the callable is missing, fails, or gives something else than an nn.Module.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BadInput(
            f"teacher {text}",
            expected="an existing file in FILE.py:CALLABLE",
            got=f"no file {file!r}",
            fix="Check the path.",
        )
    module = _run(path)
    build = getattr(module, name, None)
    if not callable(build):
        names = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        raise BadInput(
            f"teacher {text}",
            expected=f"a callable {name!r} in {path.name}",
            got="nothing of that name" if build is None else type(build).__name__,
            fix=f"It defines: {', '.join(names) or 'no callable'}.",
        )
    net = _call(build, text, path)
    if not isinstance(net, nn.Module):
        raise BadInput(
            f"teacher {text}",
            expected="a torch.nn.Module as the result",
            got=type(net).__name__,
            fix=f"Let {name}() return the network.",
        )
    facts = getattr(module, "ZSQ", {})
    if not isinstance(facts, dict):
        raise BadInput(f"{path.name}: ZSQ", expected="a dictionary", got=type(facts).__name__, fix="Write ZSQ = {...}.")
    if isinstance(facts.get("decode"), str):  # the name of a function of the same file
        facts = facts | {"decode": getattr(module, facts["decode"], facts["decode"])}
    return Found(net, read_facts(facts, where=f"{path.name}: ZSQ"))


def function_of(text: str) -> Callable[[Any], Any]:
    """The function that ``FILE.py:F`` names; runs that file.

    Raises:
        BadInput: if the file or the function is missing, or the file fails.
    """
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise BadInput(f"--decode {text}", expected="FILE.py:F with an existing file", got=f"no file {file!r}",
                       fix="Check the path.")  # fmt: skip
    found = getattr(_run(Path(file)), name, None)
    if not callable(found):
        raise BadInput(f"--decode {text}", expected=f"a function {name!r} in {Path(file).name}",
                       got="nothing of that name" if found is None else type(found).__name__,
                       fix="Name a function of the file.")  # fmt: skip
    return found


def _run(path: Path) -> ModuleType:
    """Import a file under a name of its own, with its folder on the path so that it can import its neighbours."""
    name = f"zsq_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise BadInput(str(path), expected="a Python file", got="another kind", fix="Name a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise BadInput(
            str(path), expected="a file that Python can run", got=_where(error, path), fix="Correct it."
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(str(path.resolve().parent))
    return module


def _call(build: Callable[[], object], text: str, path: Path) -> object:
    try:
        return build()
    except Exception as error:
        raise BadInput(
            f"teacher {text}",
            expected="a callable that works without arguments",
            got=_where(error, path),
            fix="Correct it, or wrap it in a function without arguments.",
        ) from error


def _where(error: Exception, path: Path) -> str:
    """The error with the last line of the user's file that it passed through."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.resolve()
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    at = f" ({path.name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{at}"


def from_timm(name: str, *, pretrained: bool) -> Found:
    """Build ``timm:NAME``; its facts are timm's data configuration.

    Raises:
        BadInput: without timm, or for a name it does not have.
    """
    timm, configs = import_package("timm"), import_package("timm.data")
    if not timm.is_model(name):
        raise unknown("timm", name, timm.list_models())
    net: Any = fetch(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained))
    config = configs.resolve_model_data_config(net)
    c, h, w = (int(side) for side in config["input_size"])
    resize = math.floor(h / config["crop_pct"])
    facts = Facts(
        classes=int(net.num_classes),
        image=(c, h, w),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=resize,
        crop=h if h == w else None,
    )
    return Found(net, facts)


def from_pytorchcv(name: str, *, pretrained: bool) -> Found:
    """Build ``pytorchcv:NAME``; CIFAR and ImageNet networks are known with their normalisation.

    Raises:
        BadInput: without pytorchcv, or for a name it does not have.
    """
    provider = import_package("pytorchcv.model_provider")
    try:
        net: Any = fetch(f"pytorchcv:{name}", lambda: provider.get_model(name, pretrained=pretrained))
    except ValueError as error:
        raise unknown("pytorchcv", name, list(getattr(provider, "_models", {}))) from error
    h, w = (int(side) for side in net.in_size)
    common = Facts(classes=int(net.num_classes), image=(3, h, w))
    if "cifar" in name:
        return Found(net, common.or_else(Facts(mean=CIFAR_MEAN, std=CIFAR_STD)))
    if net.num_classes == 1000:
        # pytorchcv measures its networks on a centre crop of 0.875 of the resized image.
        return Found(
            net, common.or_else(Facts(mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=math.ceil(h / 0.875), crop=h))
        )
    return Found(net, common)


def import_package(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        BadInput: if it is not installed, or does not import.
    """
    package = name.partition(".")[0]
    note = "torchvision must match the build of torch: beside a CPU-only torch its default wheel does not import"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"teacher {package}:NAME",
            expected=f"package {package}",
            got=f"no module {error.name!r}",
            fix=f"Install it with {INSTALL} ({note}).",
        ) from error
    except (ImportError, RuntimeError, AttributeError, OSError) as error:  # what a torchvision of another build raises
        raise BadInput(
            f"teacher {package}:NAME",
            expected=f"package {package} to import",
            got=f"{error}",
            fix=f"Install matching versions with {INSTALL} ({note}).",
        ) from error


def fetch(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network, saying how to go on where its weights cannot be had.

    Raises:
        BadInput: without network and cache.
    """
    try:
        return build()
    except OSError as error:
        raise BadInput(
            f"teacher {name}",
            expected="its weights, from the network or the package's cache",
            got=f"{error}",
            fix="Give them as --weights FILE.safetensors.",
        ) from error


def unknown(package: str, name: str, known: list[str]) -> BadInput:
    """The message for a name that a package does not have."""
    close = difflib.get_close_matches(name, known, n=3)
    return BadInput(
        f"teacher {package}:{name}",
        expected=f"a network of {package}",
        got=repr(name),
        fix=f"Did you mean {', '.join(close)}?" if close else f"See the list of {package}.",
    )
