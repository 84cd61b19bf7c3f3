"""`fwl-export compare-adaptation`: what adapting gains and costs, and dynamic evaluation too."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.options import (
    OUTPUT,
    ForceOption,
    JsonOption,
    complete_checkpoint,
    completion,
)
from fwl_export.cli.terminal import COLUMNS, print_json, progress_bar, table

if TYPE_CHECKING:
    from fwl_export.adaptation.compare import Comparison, ComparisonPlan


_TUNING = "Tuning of dynamic evaluation"


def compare_adaptation(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, or 'demo'.",
            show_default=False,
            autocompletion=complete_checkpoint,
        ),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, read in order as one stream.", show_default=False),
    ] = None,
    plain: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same network, trained without adaptation."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens to read; 0 means all.", min=0)
    ] = 0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.", min=1)] = 1,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Text file to tune on.",
            show_default="the beginning of TEXTS",
            rich_help_panel=_TUNING,
        ),
    ] = None,
    tuning_tokens: Annotated[
        int,
        typer.Option(help="Largest number of tokens to tune on.", min=1, rich_help_panel=_TUNING),
    ] = 6000,
    segments: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Segment lengths to try, in tokens, separated by commas.",
            rich_help_panel=_TUNING,
        ),
    ] = "128,32,16",
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only count the FLOPs of a model of this shape: gpt2-small, or the path of a "
            "config.json. Takes no CHECKPOINT.",
            autocompletion=completion("gpt2-small"),
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to write: results.json, results.md and plots.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compare adaptation with dynamic evaluation.

    Reads the same blocks of text in turns, in PyTorch: without adaptation, with dynamic
    evaluation (Krause et al., 2018, with the SGD and the RMS rule, tuned), and with fast weights
    off and on. Prints perplexity, seconds, counted FLOPs by part, and peak memory, relative to
    standard inference of the same backbone.

    Example:
      fwl-export compare-adaptation demo play.txt --validation other.txt -o out
    """
    if shape is not None:
        _count(shape, json)
        return
    if checkpoint is None or not texts:
        raise typer.BadParameter("give a CHECKPOINT and at least one text file, or --shape")
    from fwl_export.adaptation.compare import ComparisonPlan

    if output is not None:
        from fwl_export.files import check_output

        check_output(output, "a comparison", _is_comparison, force)
    plan = ComparisonPlan(_read_segments(segments), tuning_tokens, max_tokens)
    found = _compare(checkpoint, plain, texts, validation, plan, threads, output)
    if json:
        print_json(found.to_dict())
        return
    _print(found)
    if output is not None:
        print(f"wrote {output}: results.json, results.md, adaptation.png, adaptation.svg")


def _read_segments(text: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise typer.BadParameter(f"--segments is '{text}'; expected numbers such as 128,32,16")
    return tuple(map(int, numbers))


def _is_comparison(folder: Path) -> bool:
    return (folder / "results.json").is_file() and (folder / "adaptation.svg").is_file()


def _compare(
    checkpoint: str,
    plain: Path | None,
    texts: list[Path],
    validation: Path | None,
    plan: ComparisonPlan,
    threads: int,
    output: Path | None,
) -> Comparison:
    import torch

    from fwl_export.adaptation import plots
    from fwl_export.adaptation.compare import check_pair, compare, read_texts
    from fwl_export.demo import checkpoint_folder
    from fwl_export.model.checkpoint import load_checkpoint

    if output is not None:  # before the work, not after it
        plots.import_figure()
    loaded = load_checkpoint(checkpoint_folder(checkpoint))
    other = load_checkpoint(plain) if plain is not None else None
    if other is not None:
        check_pair(loaded, other)
    read = read_texts(loaded, texts, validation, plan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compare(loaded.model, other.model if other else None, read, plan, progress_bar)
    finally:
        torch.set_num_threads(before)
    if output is not None:
        _write(found, output)
    return found


def _write(found: Comparison, folder: Path) -> None:
    import json

    from fwl_export.adaptation.plots import write_plots
    from fwl_export.adaptation.report import to_markdown
    from fwl_export.files import replaced_folder

    with replaced_folder(folder) as beside:
        text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
        (beside / "results.json").write_text(text + "\n", encoding="utf-8")
        (beside / "results.md").write_text(to_markdown(found), encoding="utf-8")
        write_plots(found, beside)


def _print(found: Comparison) -> None:
    from fwl_export.adaptation.report import CLASS_NOTES, notes, tables

    main, parts, *classes = tables(found)
    print(table(*main))
    for note in notes(found):
        print("\n" + textwrap.fill(note, COLUMNS))
    for part in (parts, *classes):
        print("\n" + table(*part))
    print("\n" + textwrap.fill(CLASS_NOTES, COLUMNS))


def _count(shape: str, json: bool) -> None:
    from fwl_export.adaptation.cost import SHAPES, count_shape
    from fwl_export.adaptation.report import part_table
    from fwl_export.model.checkpoint import load_config

    config = SHAPES[shape] if shape in SHAPES else load_config(Path(shape))
    counted: dict[str, Any] = {
        f"{name}, T = {chunk}": parts
        for chunk in (256, 1)
        for name, parts in count_shape(config, chunk).items()
    }
    if json:
        print_json({"shape": shape, "config": config.to_dict(), "flops_per_token": counted})
        return
    names = list(counted)
    for pair in (names[:2], names[2:]):
        print(table(*part_table({name: counted[name] for name in pair})) + "\n")
