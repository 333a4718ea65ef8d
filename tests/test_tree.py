"""What must stay true of the whole tree: no machine paths, requirements, start-up time."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tree_files() -> list[Path]:
    """Files that are, or would be, committed; everything but hidden and generated folders where git cannot tell."""
    command = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        folders = [ROOT / name for name in (".ci", "bench", "docs", "scripts", "src", "tests")]
        paths = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
    return [path for path in paths if path.is_file() and path.suffix not in (".safetensors", ".png", ".pyc", ".npz")]


def test_no_machine_paths() -> None:
    path = re.compile(r"(?<![\w.:/~-])/(?:home|root|work|mnt|opt|tmp|Users|media)/\w")
    found = []
    for file in tree_files():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"{file.relative_to(ROOT)}:{n}: {line[:100]}" for n, line in enumerate(lines, 1) if path.search(line)]
    assert not found


def test_requirements_never_pull_torchvision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"export", "openvino", "vision", "eval", "dist", "report", "dev"}
    groups = [project["dependencies"], *(lines for name, lines in extras.items() if name != "vision")]
    pulls = re.compile("torchvision|timm|pytorchcv|open.clip|curvlinops")
    assert not [line for lines in groups for line in lines if pulls.match(line)]


def test_every_pip_call_is_constrained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8") + (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    calls = [line for line in makefile.splitlines() if "pip install" in line and not line.startswith("#")]
    assert calls
    assert not [line for line in calls if "-c constraints.txt" not in line]
    assert "torch==" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


IMPORT = "import zsq, sys; sys.exit('torch' in sys.modules)"
HELP = """
import sys
sys.argv = ["zsq", "--help"]
from zsq.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
sys.exit(code or "torch" in sys.modules)
"""


@pytest.mark.parametrize(("program", "times"), [(IMPORT, 4), (HELP, 30)], ids=["import", "help"])
def test_start_is_quick_and_without_torch(program: str, times: int) -> None:
    # Processor time, best of five: what the start costs, not what else the machine does.
    seconds: dict[str, list[float]] = {program: [], "pass": []}
    for _ in range(5):
        for code, taken in seconds.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert done.returncode == 0, done.stderr or "torch was imported"
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds[program]) < 0.3
    assert min(seconds[program]) < times * min(seconds["pass"])  # bench/startup.py: 2.2 and 18 times
