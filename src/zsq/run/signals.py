"""Stopping between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from zsq.errors import Interrupted


class StopSignals:
    """Context in which SIGINT and SIGTERM only leave a note; the loop reads it after each step.

    A second SIGINT stops at once. Handlers can only be set in the main thread; elsewhere, and for a signal that the
    process ignores (as under nohup), nothing changes.

    Attributes:
        signum: the first signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignals:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        while self._before and threading.current_thread() is threading.main_thread():
            signum, handler = self._before.popitem()
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise Interrupted(signum, "The step was not finished; go on from the last checkpoint with --resume.")
        self.signum = self.signum or signum
