"""What must stay true of the source: who imports whom, sizes, banned habits, docstrings."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "zsq"
FILES = sorted(SRC.rglob("*.py"))


def module_name(path: Path) -> str:
    """``src/zsq/sources/base.py`` -> ``zsq.sources.base``."""
    return ".".join(path.relative_to(SRC.parent).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
RECIPES = [name for name in TREES if name.startswith("zsq.recipes.")]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, except what only type checkers see."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imports(tree: ast.AST, known: set[str] | None = None) -> set[str]:
    """Modules imported anywhere in a file, also in functions; ``from zsq import losses`` counts as ``zsq.losses``."""
    known = set(TREES) if known is None else known
    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant):
                found.add(str(target.value))
            elif isinstance(target, ast.JoinedStr) and isinstance(target.values[0], ast.Constant):
                found.add(str(target.values[0].value).rstrip("."))
    return found


def ours(name: str) -> set[str]:
    return {other for other in imports(TREES[name]) if other in TREES and other != name}


# ---- imports


@pytest.mark.parametrize("name", ["grid", "losses", "inundation", "view"])
def test_mathematics_imports_torch_only(name: str) -> None:
    allowed = {"torch", "zsq.errors", "zsq.grid", "zsq.view", *sys.stdlib_module_names}
    assert not {other for other in imports(TREES[f"zsq.{name}"]) if not {other, other.split(".")[0]} & allowed}


def reachable(start: str) -> dict[str, str]:
    """Every module of ours that `start` imports, directly or not, each with the module that asked for it."""
    found: dict[str, str] = {}
    queue = [start]
    while queue:
        name = queue.pop()
        for other in ours(name) - set(found):
            found[other] = name
            queue.append(other)
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("forbidden", ["zsq.data", "zsq.evaluation", "zsq.finished"])
def test_recipes_cannot_reach_data(name: str, forbidden: str) -> None:
    found = reachable(name)
    assert forbidden not in found, f"{name} reaches {forbidden} through {found[forbidden]}"


def foreign_recipe_uses(name: str, tree: ast.AST) -> list[str]:
    """What a recipe takes from other recipes beyond their `source`."""
    bad: list[str] = []
    modules: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsq.recipes"):
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            modules.update(local for local, full in names.items() if node.module == "zsq.recipes")
            bad += [full for full in names.values() if node.module != "zsq.recipes" and not full.endswith(".source")]
        elif isinstance(node, ast.Import):
            bad += [alias.name for alias in node.names if alias.name.startswith("zsq.recipes")]
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            bad += [f"{node.value.id}.{node.attr}"] * (node.attr != "source")
    return [f"{name}: {use}" for use in bad]


def test_a_recipe_takes_only_the_source_of_another() -> None:
    assert not [use for name in RECIPES for use in foreign_recipe_uses(name, TREES[name])]


def test_only_the_command_line_and_its_pipeline_import_recipes() -> None:
    front = {"zsq.cli", "zsq.catalogue", "zsq.pipeline"}
    allowed = {"zsq", "zsq.recipes", *front, *RECIPES}  # zsq: the lazy public names
    users = {name for name in TREES if any(other.startswith("zsq.recipes") for other in ours(name))}
    assert users <= allowed


def test_nothing_imports_the_command_line() -> None:
    assert not {name for name in TREES if "zsq.cli" in ours(name)} - {"zsq.__main__"}


def test_accelerate_only_where_the_loop_is() -> None:
    users = {name for name in TREES if any(other.split(".")[0] == "accelerate" for other in imports(TREES[name]))}
    assert not {name for name in users if name != "zsq.fit" and not name.startswith("zsq.sources")}


def test_no_import_cycles() -> None:
    cycles = {name for name in TREES if name != "zsq" and name in reachable(name)}
    assert not cycles


def test_the_map_names_every_module() -> None:
    page = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    paths = {path.relative_to(SRC).as_posix() for path in FILES if path.name not in ("__init__.py", "__main__.py")}
    assert not {path for path in paths if f"`{path}`" not in page}


# ---- sizes


def code_lines(node: ast.AST, text: str) -> int:
    """Lines from the first to the last of `node`, without docstrings."""
    lines = set(range(getattr(node, "lineno", 1), (getattr(node, "end_lineno", None) or len(text.splitlines())) + 1))
    for part in ast.walk(node):
        if isinstance(part, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(part) is not None:
            lines -= set(range(part.body[0].lineno, (part.body[0].end_lineno or 0) + 1))
    return len(lines)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_files_have_at_most_300_lines() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 300}


def test_functions_have_at_most_60_lines() -> None:
    lengths = {f"{name}.{f.name}": code_lines(f, "") for name, tree in TREES.items() for f in functions(tree)}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_recipes_have_at_most_120_lines_of_code() -> None:
    texts = {name: (SRC.parent / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8") for name in RECIPES}
    lengths = {name: code_lines(TREES[name], text) for name, text in texts.items()}
    assert not {name: length for name, length in lengths.items() if length > 120}


# ---- habits


def habits(tree: ast.AST) -> list[str]:
    """Banned habits in one file, as "line: what"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if call == "print":
                found.append((node, "print: return a value, or log it with run.log"))
            if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                found.append((node, ".cuda(): use .to(device)"))
            if call in ("pickle.load", "pickle.loads") or (call == "torch.load" and not _weights_only(node)):
                found.append((node, "a load that can execute code: use safetensors"))
        elif isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if not caught or "BaseException" in caught:
                found.append((node, "catches everything, also Ctrl-C"))
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found.append((node, "star import"))
        elif isinstance(node, ast.Name) and node.id == "NotImplemented" + "Error":
            found.append((node, "a stub"))
        elif isinstance(node, ast.FunctionDef) and node.args.kwarg and node.args.kwarg.arg == "kwargs":
            found.append((node, "**kwargs hides the arguments"))
    return [f"{node.lineno}: {what}" for node, what in found]


def _weights_only(call: ast.Call) -> bool:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True


@pytest.mark.parametrize("name", TREES)
def test_no_banned_habits(name: str) -> None:
    found = habits(TREES[name])
    if name == "zsq.cli":
        found = [habit for habit in found if ": print:" not in habit]
    assert not found


def test_no_promises_in_comments() -> None:
    promise = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]))
    found = [f"{path.name}: {line}" for path in FILES for line in path.read_text().splitlines() if promise.search(line)]
    assert not found


SELF_EXPLANATORY = {"forward", "backward", "setup_context", "state_dict", "load_state_dict", "extra_repr"}


def undocumented(tree: ast.AST) -> list[str]:
    """Public functions, classes and methods at the top of a file without a docstring."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None and node.name not in SELF_EXPLANATORY:
                found.append(node.name)
            if isinstance(node, ast.ClassDef):
                found += [f"{node.name}.{method}" for method in undocumented(node)]
    return found


@pytest.mark.parametrize("name", TREES)
def test_public_names_have_docstrings(name: str) -> None:
    assert not undocumented(TREES[name])


# ---- the checks themselves work


@pytest.mark.parametrize(
    "code",
    [
        "print(1)", "x.cuda()", "pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)",
        "from os import *", "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept BaseException:\n    pass",
        "raise NotImplemented" + "Error", "def f(**kwargs): pass",
    ],
)  # fmt: skip
def test_habits_are_found(code: str) -> None:
    assert habits(ast.parse(code))


def test_import_rules_find_offenders() -> None:
    assert not habits(ast.parse("torch.load(f, weights_only=True)"))
    assert foreign_recipe_uses("x", ast.parse("from zsq.recipes.gdfq import gdfq"))
    assert foreign_recipe_uses("x", ast.parse("from zsq.recipes import gdfq\ngdfq.gdfq()"))
    assert foreign_recipe_uses("x", ast.parse("import zsq.recipes.gdfq"))
    assert not foreign_recipe_uses("x", ast.parse("from zsq.recipes import gdfq\ngdfq.source()"))
    assert not foreign_recipe_uses("x", ast.parse("from zsq.recipes.gdfq import source as gdfq_source"))
    code = "def f():\n    from zsq import data\nif TYPE_CHECKING:\n    import zsq.cli\nimport_module('zsq.evaluate')"
    assert imports(ast.parse(code), {"zsq.data"}) == {"zsq.data", "zsq.evaluate"}
    assert undocumented(ast.parse("class A:\n    'doc'\n    def f(self): pass\n    def _g(self): pass")) == ["A.f"]
    assert code_lines(ast.parse("def f():\n    '''doc\n    more'''\n    return 1").body[0], "") == 2
