"""Peak memory of a step of `zaq` on a real segmenter at 512x512, batch 4: generator and student, one after the other.

    python bench/zaq_memory.py --json bench/results/zaq_memory.json

Peak memory is that of the whole process, interpreter and libraries included. The bar is 8 GiB. Channel relation maps
take c x c numbers per image; maps of positions against positions, as the released program makes them, would take
(h w)^2: 64 GiB at half the resolution for this batch.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from zsq.bench import commit
from zsq.checkpoint import write_json_atomic
from zsq.insert import QuantSpec
from zsq.machine import describe_device, versions
from zsq.recipes.zaq import zaq
from zsq.run import Run
from zsq.teachers import load_teacher

MEAN, STD = (0.41434607, 0.40521503, 0.39068394), (1 / 255,)
TURNS = 2  # student updates per step of the generator, so that few steps hold both kinds


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run three updates, the last of them behind a step of the generator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=Path, default=Path("../shared/teachers"), help="folder of nets.py")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    teacher = load_teacher(
        f"{asked.teachers}/nets.py:camvid_cgnet", weights=asked.teachers / "camvid_cgnet.safetensors", task="segment",
        classes=11, image=(3, asked.size, asked.size), mean=MEAN, std=STD,
    )  # fmt: skip
    before, started = peak(), time.perf_counter()
    with Run(None, seed=0, device=teacher.device, progress=False) as run:
        outcome = zaq(teacher, run, spec=QuantSpec(8, 8), batch=asked.batch, warmup=1, steps=TURNS + 1, turns=TURNS)
    found = {
        "network": "camvid_cgnet", "size": asked.size, "batch": asked.batch, "peak_bytes": peak(),
        "loaded_bytes": before, "seconds": round(time.perf_counter() - started, 1), "plan": outcome.plan,
        "device": describe_device("cpu"), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    print(f"peak {found['peak_bytes'] / 2**30:.2f} GiB, of which {before / 2**30:.2f} before the first step")
    if asked.json is not None:
        write_json_atomic(asked.json, found)


if __name__ == "__main__":
    main()
