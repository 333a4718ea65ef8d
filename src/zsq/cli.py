"""The command `zsq`: the only module that knows everything. It parses, calls, prints, and gives exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zsq import __version__
from zsq.errors import BadInput, ZsqError
from zsq.options import AnalysisOptions, QuantOptions, ReportOptions, RunOptions, TeacherOptions, recipe_options
from zsq.usage import explain, in_words, json_text

DEFAULT_RECIPE = "zsq"

app = App(
    name="zsq",
    version=__version__,
    help="Quantize a trained vision network to 2 to 8 bits without any data.",
    suppress_keyboard_interrupt=False,  # else the parser would end the process without a word
)


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 128+signal when interrupted."""
    arguments = list(sys.argv[1:] if tokens is None else tokens)
    try:
        if arguments[:1] == ["quantize"]:
            command = quantize_command(named_recipe(arguments))
            del app["quantize"]  # the placeholder for `zsq --help`, or the options of the recipe before
            app.command(command, name="quantize")
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        stop(str(explain(error, [name for name in app if not name.startswith("-")])), 2)
    except ZsqError as error:
        stop(str(error), error.exit_code)
    except KeyboardInterrupt:  # outside a run there is nothing to save
        stop("interrupted.", 130)


def stop(message: str, code: int) -> None:
    """Print one error message to standard error and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"zsq: {message}", markup=False)
    sys.exit(code)


def show(result: dict[str, Any], *, as_json: bool, title: str) -> None:
    """Print a result: one JSON object, or a two-column table."""
    if as_json:
        sys.stdout.write(json_text(result))
        return
    table = Table(title=escape(title), show_header=False)
    for key, value in result.items():
        table.add_row(key.replace("_", " "), escape(in_words(key, value)))
    Console(highlight=False).print(table)


def named_recipe(arguments: Sequence[str]) -> str:
    """The recipe the command line names; its own options are read from its signature before parsing."""
    for position, token in enumerate(arguments):
        if token == "--recipe" and position + 1 < len(arguments):
            return arguments[position + 1]
        if token.startswith("--recipe="):
            return token.partition("=")[2]
    return DEFAULT_RECIPE


def quantize_command(recipe_name: str) -> Callable[..., None]:
    """The command `zsq quantize` with the options of one recipe."""
    from zsq import recipes

    own = recipe_options(recipes.load(recipe_name))

    def quantize(
        teacher: str = "digits",
        *,
        recipe: str = DEFAULT_RECIPE,
        quant: QuantOptions | None = None,
        running: RunOptions | None = None,
        facts: TeacherOptions | None = None,
        special: Any = None,
    ) -> None:
        quantize_network(teacher, recipe, quant or QuantOptions(), running or RunOptions(), facts or TeacherOptions(),
                         asdict(own() if special is None else special))  # fmt: skip

    quantize.__doc__ = (
        "Quantize a network without data.\n\nArgs:\n    teacher: a name from `zsq list teachers`, or FILE.py:CALLABLE."
        f"\n    recipe: the method (see `zsq list recipes`); the options below are those of {recipe_name}."
    )
    quantize.__annotations__["special"] = own | None
    return quantize


def quantize_network(
    teacher_name: str, recipe: str, quant: QuantOptions, running: RunOptions, facts: TeacherOptions,
    special: dict[str, Any],
) -> None:  # fmt: skip
    """Load the teacher, run the recipe, print the summary."""
    from zsq import pipeline
    from zsq.insert import QuantSpec
    from zsq.machine import choose_precision
    from zsq.run import Run
    from zsq.teachers import load_teacher
    from zsq.texts import layer_bits

    options, size = running.arguments(special), running.size()
    spec = QuantSpec(
        *quant.widths(), placement=quant.placement,
        include=tuple(quant.include), exclude=tuple(quant.exclude), layer_bits=layer_bits(quant.layer_bits),
        leaf=tuple(facts.leaf),
    )  # fmt: skip
    device = pipeline.resolve_device(running.device)
    teacher = load_teacher(teacher_name, **facts.facts(), device=device)
    path = running.run or pipeline.default_path(teacher, recipe, spec, running.seed)
    begun = path / "config.json" if running.resume else None
    teacher = replace(teacher, precision=choose_precision(running.precision, device, begun=begun))
    data = None if running.eval is None else pipeline.open_data(running.eval, teacher)
    images = pipeline.load_pool(running.images, teacher.sized(size), apart_from=running.eval)
    job: dict[str, Any] = {"recipe": recipe, "spec": spec, "images": images, "options": options, "synthetic": size}
    if not running.resume:  # a resumed run passed this before
        pipeline.rehearse(teacher, seed=running.seed, **job)
    config = {
        "teacher": {**facts.recorded(teacher_name), "fingerprint": teacher.fingerprint},
        "recipe": recipe, "spec": spec.to_json(), "options": options, "images": running.images,
        "synthetic": running.synthetic, "precision": teacher.precision,
    }  # fmt: skip
    with Run(path, config=config, seed=running.seed, device=device, resume=running.resume) as run:
        summary = pipeline.produce(teacher, run, data=data, **job)
    show(summary, as_json=running.json, title=f"{teacher.name}, {recipe}, W{spec.weight_bits}A{spec.act_bits}: {path}")


@app.command
def quantize() -> None:
    """Quantize a network without data. `zsq quantize --help` lists the options."""


@app.command
def evaluate(subject: str, *, data: str | None = None, device: Literal["auto", "cpu", "cuda"] = "auto",
             runtime: Literal["ort", "openvino"] = "ort", json: bool = False,
             facts: TeacherOptions | None = None) -> None:  # fmt: skip
    """Score a run, a teacher or an ONNX file; without --data, how far a run's student agrees with its teacher.

    Args:
        subject: a run directory, a teacher as for `zsq quantize`, or FILE.onnx, which is run as it is.
        data: labelled set (see `zsq list data`).
        device: where to compute; an ONNX file always runs on the CPU.
        runtime: what runs an ONNX file: ONNX Runtime or OpenVINO.
        json: print one JSON object instead of a table.
        facts: facts of a network that the package does not know.
    """
    from zsq import finished, pipeline

    where = pipeline.resolve_device(device)
    if Path(subject).is_dir():
        if facts is not None:
            given = sorted(f"--{key}" for key, value in vars(facts).items() if value)
            raise BadInput(f"zsq evaluate {subject}", expected="no facts of a network: the run knows its teacher",
                           got=", ".join(given), fix="Leave them out.")  # fmt: skip
        result = finished.evaluate(Path(subject), data=data, device=where)
    elif data is None:
        raise BadInput("zsq evaluate", expected=f"--data to score {subject!r} on, or a run directory", got="neither",
                       fix="See `zsq list data` and `zsq list teachers`.")  # fmt: skip
    elif Path(subject).suffix == ".onnx":
        result = finished.evaluate_onnx(subject, (facts or TeacherOptions()).facts(), data=data, runtime=runtime)
    else:
        result = finished.evaluate_teacher(subject, (facts or TeacherOptions()).facts(), data=data, device=where)
    show(result, as_json=json, title=subject)


@app.command
def export(run: Path, *, target: Literal["ort", "openvino", "torch"] = "ort", output: Path | None = None,
           benchmark: Annotated[bool, Parameter(negative=())] = False, device: Literal["auto", "cpu", "cuda"] = "cpu",
           json: bool = False) -> None:  # fmt: skip
    """Write the student of a finished run as a file for an integer runtime, run that file, and compare.

    Args:
        run: a finished run directory.
        target: ort (ONNX Runtime), openvino, or torch (a torch.export program).
        output: the file; model-TARGET.onnx or .pt2 in the run directory if not given.
        benchmark: also measure size and speed against the float network in the same runtime.
        device: where the networks are loaded; the file is checked on the CPU.
        json: print one JSON object instead of a table.
    """
    from zsq import pipeline
    from zsq.export import export as export_run
    from zsq.export.words import in_words as export_in_words

    where = str(pipeline.resolve_device(device))
    result = export_run(run, target=target, output=output, benchmark=benchmark, device=where)
    if result["warning"]:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"zsq: {result['warning']}", markup=False)
    show(result if json else export_in_words(result), as_json=json, title=f"{run}: {result['file']}")


@app.command
def analyse(run: Path, *, how: AnalysisOptions | None = None) -> None:
    """Explain a finished run: raw values and figures go into RUN/analysis.

    Args:
        run: a finished run directory.
        how: what to measure, how finely, and on which images.
    """
    from zsq import pipeline
    from zsq.analysis import analyse as measure

    how = how or AnalysisOptions()
    found = measure(run, **how.arguments(), device=pipeline.resolve_device(how.device))
    rows = {f"{name}: {key}": value for name, result in found.items() for key, value in result.items()}
    show(found if how.json else rows, as_json=how.json, title=str(run))


@app.command
def report(run: Path, *, how: ReportOptions | None = None) -> None:
    """Write one HTML page about a finished run, with everything in it: RUN/report.html.

    Args:
        run: a finished run directory.
        how: where to, what to measure, on how many images.
    """
    from zsq import pipeline
    from zsq.reporting import report as write_page

    how = how or ReportOptions()
    result = write_page(run, output=how.output, count=how.count, sensitivity=how.sensitivity,
                        device=pipeline.resolve_device(how.device))  # fmt: skip
    show(result if how.json else {key: result[key] for key in ("file", "verdict")}, as_json=how.json, title=str(run))


@app.command(name="list")
def listing(what: Literal["recipes", "teachers", "data"], *, json: bool = False) -> None:
    """List what there is to choose from.

    Args:
        what: recipes, teachers or data.
        json: print one JSON object instead of a table.
    """
    from zsq import catalogue

    rows = getattr(catalogue, what)()
    if json:
        sys.stdout.write(json_text({what: rows}))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(escape, row.values()))
    Console(highlight=False).print(table)


@app.command
def bench(matrix: Path, *, runs: Path = Path("runs/bench"), jobs: int = 1, output: Path | None = None,
          teacher: str | None = None, budget: Literal["quick", "standard", "paper"] | None = None,
          reuse: Annotated[list[Path] | None, Parameter(consume_multiple=True, negative=())] = None,
          only: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
          json: bool = False) -> None:  # fmt: skip
    """Run a matrix of teachers, methods, bits and seeds, and print one table.

    Args:
        matrix: MATRIX.toml; see bench/ for examples.
        runs: folder for the run directories; run the command again to go on where it stopped.
        jobs: cells side by side, one core each.
        output: also write the results to this file; analysis and figures go beside it.
        teacher: in place of the file's teachers.
        budget: in place of the file's.
        reuse: result files to take finished cells over from, where they would be the same run again.
        only: patterns of cells (named as their run directories), e.g. "*GDFQ*W3A3-s0"; the others are left out.
        json: print one JSON object instead of a table.
    """
    from zsq import bench as benchmark
    from zsq.checkpoint import write_json_atomic

    if output is not None and not output.parent.is_dir():
        raise BadInput("--output", expected="a file in an existing folder", got=str(output), fix="Make the folder.")
    say = Console(stderr=True, highlight=False)
    result = benchmark.run_matrix(
        matrix, runs=runs, jobs=jobs, report=lambda line: say.print(line, markup=False), teacher=teacher, budget=budget,
        reuse=reuse or [], only=only, figures=None if output is None else output.with_suffix(""),
    )  # fmt: skip
    if output is not None:
        write_json_atomic(output, result)
    if json:
        show(result, as_json=True, title=matrix.name)
        return
    table = Table(*benchmark.COLUMNS, title=escape(matrix.name))
    for row in benchmark.in_words(result["table"]):
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
