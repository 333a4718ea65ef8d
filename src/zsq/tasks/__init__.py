"""Tasks: what a network's raw output means. One file per task; nothing elsewhere asks which one it is."""

from __future__ import annotations

from zsq.tasks.base import Boxes, Meter, Outline, Part, Score, Task
from zsq.tasks.classify import Classify
from zsq.tasks.detect import Detect
from zsq.tasks.segment import Segment

__all__ = ["TASKS", "Boxes", "Meter", "Outline", "Part", "Score", "Task"]

# A new task is one file and one line here.
TASKS: dict[str, type[Task]] = {"classify": Classify, "segment": Segment, "detect": Detect}
