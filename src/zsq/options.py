"""Options of the command line, as typed groups. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from cyclopts import Parameter, Token

from zsq.errors import BadInput
from zsq.texts import height_width, image_shape


def whole_number(kind: object, tokens: Sequence[Token]) -> int:
    """Read a whole number; the parser alone would round 2.5 to 2."""
    return int(tokens[0].value)


Whole = Parameter(converter=whole_number)
Several = Parameter(consume_multiple=True, negative=())
COMMON = {"teacher", "run", "spec", "images", "base", "budget", "fidelity", "steps", "batch", "micro_batch",
          "precision"}  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Facts of a network that the package does not know.

    Attributes:
        weights: weights of the network, a .safetensors file.
        task: what the network does.
        classes: number of classes.
        image: input shape, e.g. 3x32x32.
        mean: mean per channel that the input is normalised with, in 0..1 units.
        std: standard deviation per channel, in 0..1 units.
        channels: channel order of the input.
        resize: shorter side that test images are resized to.
        crop: side of the centre crop of test images.
        raw: modules that give the raw output, MODULE[,MODULE]; found if not given.
        decode: what makes boxes of a detector's output, FILE.py:F; that file is run.
        leaf: modules kept whole where tracing fails.
    """

    weights: Path | None = None
    task: Literal["classify", "segment", "detect"] | None = None
    classes: Annotated[int | None, Whole] = None
    image: str | None = None
    mean: Annotated[list[float] | None, Several] = None
    std: Annotated[list[float] | None, Several] = None
    channels: Literal["rgb", "bgr"] | None = None
    resize: Annotated[int | None, Whole] = None
    crop: Annotated[int | None, Whole] = None
    raw: str | None = None
    decode: str | None = None
    leaf: Annotated[list[str], Several] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The keyword arguments of `zsq.teachers.load_teacher`, JSON-able."""
        return {
            "weights": None if self.weights is None else str(self.weights),
            "task": self.task,
            "classes": self.classes,
            "image": None if self.image is None else image_shape(self.image),
            "mean": self.mean,
            "std": self.std,
            "channels": self.channels,
            "resize": self.resize,
            "crop": self.crop,
            "raw": self.raw,
            "decode": self.decode,
            "leaf": self.leaf,
        }

    def recorded(self, name: str) -> dict[str, Any]:
        """Name and facts as a run keeps them: files by their whole path, so that they are found from anywhere.

        Args:
            name: TEACHER as on the command line.
        """
        whole = {"name": name, **self.facts()}
        for key in ("name", "weights", "decode"):
            file, colon, inner = str(whole[key]).rpartition(":") if key != "weights" else (str(whole[key]), "", "")
            if whole[key] is not None and (key == "weights" or file.endswith(".py")):
                whole[key] = f"{Path(file).resolve()}{colon}{inner}"
        return whole


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """What is quantized, and how finely.

    Attributes:
        bits: bits of weights and activations, 2 to 8.
        weight_bits: bits of the weights, where they differ from --bits.
        act_bits: bits of the activations, where they differ from --bits.
        layer_bits: bits of single layers or sites, PATTERN=N.
        include: only layers and sites that match one of these patterns.
        exclude: no layer or site that matches one of these patterns.
        placement: paper (as published) or deploy (the whole graph can run on integers).
    """

    bits: Annotated[int, Whole] = 4
    weight_bits: Annotated[int | None, Whole] = None
    act_bits: Annotated[int | None, Whole] = None
    layer_bits: Annotated[list[str], Several] = field(default_factory=list)
    include: Annotated[list[str], Several] = field(default_factory=list)
    exclude: Annotated[list[str], Several] = field(default_factory=list)
    placement: Literal["paper", "deploy"] = "paper"

    def widths(self) -> tuple[int, int]:
        """Bits of weights and of activations.

        Raises:
            BadInput: for anything outside 2 to 8, naming the option.
        """
        found = []
        for name in ("weight_bits", "act_bits"):
            own = getattr(self, name)
            option, bits = ("--bits", self.bits) if own is None else (f"--{name.replace('_', '-')}", own)
            if not 2 <= bits <= 8:
                raise BadInput(option, expected="a whole number from 2 to 8", got=bits, fix="Choose 2 to 8.")
            found.append(bits)
        return found[0], found[1]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long, where, and on what.

    Attributes:
        base: whose images a recipe such as ait works on.
        budget: quick (minutes), standard (under an hour) or paper (the published schedule).
        fidelity: best (our corrected values), paper (as stated) or official (as the released code executes).
        steps: student updates; the budget's if not given.
        batch: images per step; the budget's if not given.
        micro_batch: split the student's batch into parts of at most this size to save memory.
        synthetic: size of the synthetic images, e.g. 128x160; the network's own if not given.
        images: a saved pool instead of the recipe's own source: FILE.safetensors, npz:FILE[a:b] (real,
            pixels only), or noise (controls).
        run: run directory; runs/TEACHER-RECIPE-WxAy-sSEED if not given.
        eval: labelled set to score teacher and student on afterwards.
        device: where to compute.
        precision: what is multiplied in while training: bf16 (and the student on its integers), float32, or auto, the
            faster one here.
        seed: seed of every random number.
        resume: go on with an interrupted run.
        json: print one JSON object instead of a table.
    """

    base: str | None = None
    budget: Literal["quick", "standard", "paper"] = "quick"
    fidelity: Literal["best", "paper", "official"] = "best"
    steps: Annotated[int | None, Whole] = None
    batch: Annotated[int | None, Whole] = None
    micro_batch: Annotated[int | None, Whole] = None
    synthetic: str | None = None
    images: str | None = None
    run: Path | None = None
    eval: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "float32"] = "auto"
    seed: Annotated[int, Whole] = 0
    resume: Annotated[bool, Parameter(negative=())] = False
    json: Annotated[bool, Parameter(negative=())] = False

    def arguments(self, special: dict[str, Any]) -> dict[str, Any]:
        """The recipe's keyword arguments: what was given of its own options, and of those all recipes share.

        Raises:
            BadInput: for a seed that is none.
        """
        if not 0 <= self.seed < 2**63:
            raise BadInput("--seed", expected="a number from 0 to 2^63 - 1", got=self.seed, fix="Choose a smaller one.")
        shared = {key: getattr(self, key) for key in ("base", "budget", "fidelity", "steps", "batch", "micro_batch")}
        return {key: value for key, value in (special | shared).items() if value is not None}

    def size(self) -> tuple[int, int] | None:
        """Height and width of the synthetic images, if they were given."""
        return None if self.synthetic is None else height_width(self.synthetic)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What to measure, how finely, and on which images.

    Attributes:
        what: the instrument: CE-KL gradient cosine, Hessian trace, loss landscape, flips of integer weights, or all.
        images: real images as a control arm beside the synthetic ones, e.g. npz:FILE[a:b] (pixels only).
        preset: quick (minutes on a CPU) or full (a GPU job).
        count: images per arm; the preset's if not given.
        probes: probes of the Hessian trace, at most; the preset's if not given.
        points: points per side of the loss surface, odd; the preset's if not given.
        device: where to compute.
        json: print one JSON object instead of a table.
    """

    what: Literal["cosine", "trace", "landscape", "flips", "all"] = "all"
    images: str | None = None
    preset: Literal["quick", "full"] = "quick"
    count: Annotated[int | None, Whole] = None
    probes: Annotated[int | None, Whole] = None
    points: Annotated[int | None, Whole] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Annotated[bool, Parameter(negative=())] = False

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `zsq.analyse`, except the device."""
        names = ("what", "images", "preset", "count", "probes", "points")
        return {name: getattr(self, name) for name in names}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the page goes, and what is measured for it.

    Attributes:
        output: the page; report.html in the run directory if not given.
        count: images that the sensitivity of single layers is measured on; at most 128, by the network's size.
        sensitivity: measure what each layer's quantization costs alone.
        device: where to compute.
        json: print one JSON object instead of a table.
    """

    output: Path | None = None
    count: Annotated[int | None, Whole] = None
    sensitivity: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    json: Annotated[bool, Parameter(negative=())] = False


def recipe_options(recipe: Callable[..., Any]) -> type:
    """A group with the options that only this recipe has, read from its signature and docstring.

    Args:
        recipe: a recipe function; its keyword-only parameters are its options.

    Returns:
        A frozen dataclass, one field per option, for the command line to parse into.
    """
    hints, texts = get_type_hints(recipe), argument_texts(recipe)
    own = [p for p in inspect.signature(recipe).parameters.values() if p.name not in COMMON]
    fields = []
    for p in own:
        whole = int in (hints[p.name], *get_args(hints[p.name]))
        about = Parameter(help=texts.get(p.name), negative=(), converter=whole_number if whole else None)
        fields.append((p.name, Annotated[hints[p.name], about], field(default=p.default)))
    group = make_dataclass(f"{recipe.__name__.capitalize()}Options", fields, frozen=True, kw_only=True)
    group.__module__ = __name__  # make_dataclass names "types", which the parser takes for a builtin type
    return Parameter(name="*")(group)


def argument_texts(function: Callable[..., Any]) -> dict[str, str]:
    """The `Args:` section of a docstring as name -> text.

    Example:
        >>> argument_texts(recipe_options)["recipe"]
        'a recipe function; its keyword-only parameters are its options.'
    """
    section = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.getdoc(function) or "", re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section.group(1) if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
