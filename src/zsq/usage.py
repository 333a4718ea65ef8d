"""The words of the command line: results, and what is wrong with a command in the form of all other errors."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from cyclopts import exceptions

from zsq.errors import BadInput

_WORDS = {int: "a whole number", float: "a number", bool: "no value (it is a switch)"}


def explain(error: exceptions.CycloptsError, commands: Sequence[str]) -> BadInput:
    """Turn an error of the parser into ours.

    Args:
        error: what the parser raised.
        commands: names of all commands.

    Returns:
        The error to show, exit code 2.
    """
    chain = " ".join(["zsq", *(error.command_chain or ())])
    fix = f"See `{chain} --help`."
    kind, token = type(error).__name__, getattr(error, "token", None)
    text = " ".join(str(error).split())
    if kind == "CoercionError" and token is not None:
        target: Any = getattr(error, "target_type", None)
        return BadInput(_name(error), expected=_words(target), got=repr(token.value), fix=fix)
    if kind == "UnknownCommandError":
        got = re.search(r'"(.*?)"', text)
        return BadInput("COMMAND", expected=f"one of {', '.join(commands)}", got=got.group(1) if got else text, fix=fix)
    if kind == "UnknownOptionError" and token is not None:
        near = re.search(r"Did you mean (\S+?)\?", text)
        hint = f"Did you mean {near.group(1)}? " if near else ""
        return BadInput(chain, expected="options that it has", got=token.keyword or token.value, fix=hint + fix)
    if kind in ("MissingArgumentError", "ConsumeMultipleError"):
        return BadInput(_name(error), expected="a value", got="nothing", fix=fix)
    if kind == "UnusedCliTokensError":
        rest = " ".join(error.unused_tokens or ())
        return BadInput(chain, expected="no further argument", got=repr(rest), fix=fix)
    if kind == "RepeatArgumentError":
        return BadInput(_name(error), expected="to be given once", got="more than once", fix=fix)
    return BadInput(chain, expected="a command line it understands", got=text.rstrip("."), fix=fix)


def _name(error: exceptions.CycloptsError) -> str:
    """The option as it was written, or the positional argument in capitals."""
    token, argument = getattr(error, "token", None), error.argument
    keyword = getattr(token, "keyword", None) or getattr(error, "keyword", None)
    if keyword:
        return str(keyword)
    if argument is None:
        return "zsq"
    positional = argument.field_info.kind is not argument.field_info.KEYWORD_ONLY
    return argument.name.lstrip("-").upper() if positional else argument.name


def _words(target: Any) -> str:
    """A type as people say it."""
    if get_origin(target) is Literal:
        return f"one of {', '.join(map(str, get_args(target)))}"
    plain = [kind for kind in (target, *get_args(target)) if kind in _WORDS]
    return _WORDS[plain[0]] if plain else "another value"


def in_words(key: str, value: object) -> str:
    """One value of a summary for people: shares as percent, lists and tables in one line."""
    if isinstance(value, float) and key.endswith(("score", "agreement", "top5", "share", "_accuracy", "_map", "_miou")):
        return f"{100 * value:.2f} %"
    if isinstance(value, list) and all(isinstance(item, float) for item in value):
        return " to ".join(f"{100 * item:.2f} %" for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def json_text(result: dict[str, Any]) -> str:
    """A result as one line of JSON."""
    return json.dumps(result) + "\n"
