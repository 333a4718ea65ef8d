"""What the facts come to, in sentences: the verdict, and what to know before the network is used."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zsq.reporting.facts import Facts

METRICS = {"top1": "top-1", "miou": "mIoU", "map50": "mAP@.5", "map": "mAP"}
SAME = {"classify": "decides like the float network on", "segment": "decides like the float network on",
        "detect": "finds what the float network finds (mAP@.5) on"}  # fmt: skip
OPERAND = "reads values on no grid"  # how such an entry begins
CLIPPED = 0.01  # share of an activation's values outside its range that is worth a word


@dataclass(frozen=True)
class Remark:
    """Something to know.

    Attributes:
        head: in a few words.
        text: in one or two sentences.
        command: what to type; empty if there is nothing to do.
    """

    head: str
    text: str
    command: str = ""


def percent(share: float | None, digits: int = 2) -> str:
    r"""A fraction as percent, with a space that does not break.

    Example:
        >>> percent(0.98765), percent(None)
        ('98.77\xa0%', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def amount(count: float) -> str:
    """Bytes for people.

    Example:
        >>> amount(512), amount(146_300), amount(46_800_000)
        ('512 bytes', '146 kB', '46.8 MB')
    """
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            break
    return f"{count:.3g} {unit}"


def title(facts: Facts) -> str:
    """Teacher and bits."""
    s = facts.summary
    if s["weight_bits"] == s["act_bits"]:
        return f"{s['teacher']} in {s['weight_bits']} bits"
    return f"{s['teacher']} in {s['weight_bits']}-bit weights, {s['act_bits']}-bit activations"


def verdict(facts: Facts) -> str:
    """The report in three sentences."""
    s, size = facts.summary, facts.size
    made = "on real images" if facts.real_images else "without any real image"
    bits = f"{s['weight_bits']}-bit weights and {s['act_bits']}-bit activations"
    text = [
        f"Quantized {made} to {bits}, {s['teacher']} {SAME[facts.task]} {percent(s['agreement'])} of "
        f"{_inputs(s['agreement_inputs'])}{_crops(s)}"
    ]
    if "student_score" in s:
        drop = 100 * (s["teacher_score"] - s["student_score"])
        step = f"{abs(drop):.2f} points {'below' if drop > 0 else 'above'}" if abs(drop) >= 0.005 else "level with"
        text[0] += (
            f", and scores {percent(s['student_score'])} {METRICS.get(s['metric'], s['metric'])}, {step} the float"
            f" network's {percent(s['teacher_score'])}, on {s['eval_count']:,} labelled images."
        )
    else:
        text[0] += ". How often it is right was not measured: no labelled set was given."
    text.append(f"Packed, it takes {amount(size.packed)} instead of {amount(size.whole)}, {size.ratio:.1f} times less.")
    text.append(stays_float(facts))
    return " ".join(text)


def _crops(summary: Mapping[str, Any]) -> str:
    """Agreement on crops, which is the harder test; runs of earlier versions do not have it."""
    share = summary.get("crop_agreement")
    return "" if share is None else f", and on {percent(share)} of random crops of them"


def stays_float(facts: Facts) -> str:
    """What stays float, counted by kind, in one sentence."""
    if not facts.floats:
        return "Nothing in it stays float."
    operands = Counter(row["op"] for row in facts.floats if row["why"].startswith(OPERAND))
    kinds = Counter(kind for row in facts.floats if (kind := _kind(row["name"], row["op"], row["why"])))
    parts = [kind if count == 1 else f"{count} {_PLURAL.get(kind, kind)}" for kind, count in kinds.most_common()]
    parts.sort(key=lambda part: not part[0].isdigit())
    if operands:
        parts.append(f"inputs of {_list([f'{count} {op}' for op, count in operands.most_common()])}")
    shown, rest = parts[:6], len(parts) - 6
    return f"What stays float: {_list(shown + ([f'{rest} more kinds'] if rest > 0 else []))}."


def remarks(facts: Facts) -> list[Remark]:
    """What to know before the network is used, the weightiest first."""
    return [*_about_scores(facts), *_about_integers(facts), *_about_making(facts)]


def _about_scores(facts: Facts) -> list[Remark]:
    s, run = facts.summary, shlex.quote(facts.place)
    found = []
    images = "real images" if facts.real_images else "synthetic images"
    text = (
        f"Agreement says how often the low-bit network decides like the float one on {images}, not how often either is"
        " right. Where both err alike they agree, and photographs may be harder or easier than these images."
    )
    if "student_score" not in s:
        found.append(Remark("No labelled score", text, f"zsq evaluate {run} --data DATA"))
    else:
        name = s.get("eval_data", {}).get("name", "the labelled set")
        low, high = s.get("student_interval") or (None, None)
        text += f" The score is of {name}; nothing was chosen on it."
        if low is not None:
            text += f" With {s['eval_count']:,} images its 95 % interval is {percent(low)} to {percent(high)}."
        found.append(Remark("Agreement is not accuracy", text))
    return found


def _about_integers(facts: Facts) -> list[Remark]:
    s, run = facts.summary, shlex.quote(facts.place)
    found = []
    if s["placement"] == "paper":
        text = (
            "Placement paper quantizes what the papers quantize: weights, and activations behind ReLUs. BatchNorm, "
            "additions, biases and outputs are computed in float, so a runtime cannot stay on integers throughout."
        )
        found.append(Remark("Not integer-only", text, "zsq quantize ... --placement deploy"))
    for target, record in facts.exports.items():
        if record.get("float_convolutions"):
            count = len(record["float_convolutions"])
            text = f"{count} of {record.get('convolutions', '?')} convolutions of the {target} file run in float."
            found.append(Remark("Some convolutions run in float", text))
    if not facts.exports:
        text = "Scores and agreement are of a simulation in float arithmetic. An exported file is checked against it."
        found.append(Remark("Not exported yet", text, f"zsq export {run} --target ort --benchmark"))
    few = min(s["weight_bits"], s["act_bits"])
    if few < 8 and facts.exports:
        text = "Today's integer kernels compute in 8 bits: fewer bits make the file smaller, not faster."
        found.append(Remark("Size, not speed", text))
    return found


def _about_making(facts: Facts) -> list[Remark]:
    s = facts.summary
    found = []
    if facts.real_images:
        text = f"It was adjusted on {facts.real_images}. Only pixels were read, no labels; it is not zero-shot."
        found.append(Remark("Made from real images", text))
    if s.get("fidelity", "best") == "official":
        text = "Fidelity official repeats what the released program does, its defects included. The default is best."
        found.append(Remark("Released behaviour", text))
    worst = max((row for row in facts.layers if row.clipped is not None), key=lambda r: r.clipped or 0, default=None)
    if worst is not None and (worst.clipped or 0) > CLIPPED:
        text = f"{percent(worst.clipped, 1)} of the values of {worst.kind} {worst.name} lie outside its range."
        found.append(Remark("Clipping", text, f"zsq quantize ... --layer-bits '{worst.name}=8'"))
    return found


def _inputs(text: str) -> str:
    """`1024 held-out images of source gdfq` as `1,024 synthetic images`, as far as it has that form."""
    match = re.fullmatch(r"(\d+) held-out images of source (.*)", text)
    if match is None:
        return text
    kind = "real images" if match[2].startswith("real images") else "synthetic images"
    return f"{int(match[1]):,} {kind}"


def _kind(name: str, op: str, why: str) -> str:
    """A float entry as a kind that can be counted; empty for operands, which are counted by operation."""
    if match := re.fullmatch(r"(\d+) BatchNorm calls", name):
        return f"{match[1]} BatchNorms" if int(match[1]) > 1 else "a BatchNorm"
    if why.startswith(OPERAND):
        return ""
    starts = {"bias": "a bias", "output of the network": "the output",
              "weight excluded": "a weight left out on request",
              "activation excluded": "an activation left out on request"}  # fmt: skip
    return next((kind for start, kind in starts.items() if why.startswith(start)), op)


_PLURAL = {"a bias": "biases", "the output": "outputs", "a weight left out on request": "weights left out on request",
           "an activation left out on request": "activations left out on request"}  # fmt: skip


def _list(words: list[str]) -> str:
    """Words as a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
