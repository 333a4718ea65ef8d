"""What every test gets: one thread, fixed seeds, three tiny networks, and the shared data where there is some."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from zsq import cli

ROOT = Path(__file__).resolve().parent.parent

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
torch.set_num_threads(1)
# Machines differ in speed, and a failing example must fail again: no deadline, no random seed.
hypothesis.settings.register_profile("zsq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("zsq")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this test run's own, shared by its processes: the user's is neither read nor written."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSQ_CACHE", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zsq-cache"))
        yield


class Shared:
    """The folder named by `ZSQ_SHARED` (default: `shared` beside the repository): real teachers and labelled data.

    `shared / "data/cifar10_test.npz"` is that path; where it is absent the test is skipped, naming what is missing.
    """

    def __init__(self) -> None:
        self.root = Path(os.environ.get("ZSQ_SHARED") or ROOT.parent / "shared")

    def __truediv__(self, name: str) -> Path:
        if not (self.root / name).exists():
            pytest.skip(f"{name} is not in the folder of shared data (set ZSQ_SHARED)")
        return self.root / name


@pytest.fixture(scope="session")
def shared() -> Shared:
    return Shared()


class _Functional(nn.Module):
    """One ReLU module called twice, one functional relu, a residual add; BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.relu(x).mean((2, 3)))


def _settle(net: nn.Module) -> nn.Module:
    """Give BatchNorm layers the statistics of some input, so that they are neither 0 nor 1; then freeze the network."""
    with torch.no_grad():
        net.train()(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    return net.eval().requires_grad_(False)


@pytest.fixture
def bn_net() -> nn.Module:
    """Conv-BatchNorm-ReLU twice and a classifier: [b, 3, 8, 8] to [b, 10]; eval, frozen."""
    torch.manual_seed(0)
    return _settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )
    )  # fmt: skip


@pytest.fixture
def bn_free_net() -> nn.Module:
    """The same without BatchNorm: methods that need its statistics must refuse it."""
    torch.manual_seed(0)
    return _settle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )
    )  # fmt: skip


@pytest.fixture
def functional_net() -> nn.Module:
    """Call sites that no module list shows: a ReLU module called twice and a functional relu after an add."""
    torch.manual_seed(0)
    return _settle(_Functional())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tiny.Folder:
    """A user's file with networks, and their weights."""
    return tiny.write_folder(tmp_path_factory.mktemp("mine"))


@pytest.fixture
def zsq(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Command:
    """The command `zsq` in this process and an empty working directory: gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return partial(tiny.call, capsys)


@pytest.fixture(scope="session")
def finished_run(folder: tiny.Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory; copy it before changing it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    cli.main(["quantize", *folder.teacher(), "--run", str(path), "--json", *tiny.SHORT])
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run directory of one's own."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))
