"""The README is executed: every code block says in the line above it whether it runs, and those that run work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


class Block(NamedTuple):
    marker: str  # "run", "file: NAME", "not run: WHY", or empty
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    pattern = r"(?:<!-- (run|file: \S+|not run: [^\n]+) -->\n)?```(\w+)\n(.*?)```"
    return [Block(*match.groups(default="")) for match in re.finditer(pattern, page, re.DOTALL)]


def shell(text: str) -> str:
    """The commands of a console block: lines that start with "$", with their continuations."""
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(line[2:] for line in lines if line.startswith("$ "))


def run(block: Block, folder: Path, names: dict[str, Any]) -> None:
    if block.marker.startswith("file: "):
        (folder / block.marker.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, "README.md", "exec"), names)
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-e", "-c", shell(block.text)], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True,
            text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_every_block_that_should_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    ran = 0
    for block in blocks(README.read_text(encoding="utf-8")):
        if block.marker == "run" or block.marker.startswith("file: "):
            run(block, tmp_path, names)
            ran += 1
    assert ran >= 5


def test_every_code_block_says_whether_it_runs() -> None:
    silent = [block.text for block in blocks(README.read_text()) if block.language != "text" and not block.marker]
    assert not silent


def test_the_two_commands_are_shown_and_no_number_is_missing() -> None:
    page = README.read_text(encoding="utf-8")
    assert "make demo" in page
    assert "make test" in page
    assert not re.findall(r"\{\{.*?\}\}", page), "numbers to be filled in from bench/results"


def test_links_lead_somewhere() -> None:
    root = README.parent
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    gaps = [
        f"{page.relative_to(root)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert not gaps


def test_the_runner_notices_failures(tmp_path: Path) -> None:
    page = "<!-- run -->\n```console\n$ echo a \\\n  b > out\n$ false\n```\n<!-- run -->\n```python\n1 / 0\n```\n"
    console, python = blocks(page)
    with pytest.raises(AssertionError, match="false"):
        run(console, tmp_path, {})
    assert (tmp_path / "out").read_text() == "a b\n"
    with pytest.raises(ZeroDivisionError):
        run(python, tmp_path, {})
