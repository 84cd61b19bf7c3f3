"""`fwl-export compare-adaptation`: what adapting is worth and costs, beside dynamic evaluation."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwl_export.cli.terminal import JsonOption, print_json, progress_bar, table

if TYPE_CHECKING:
    from fwl_export.adaptation.compare import Comparison, ComparisonPlan


def compare_adaptation(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder of the checkpoint, or demo.", show_default=False),
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, read in order as one stream.", show_default=False),
    ] = None,
    plain: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same network trained without adaptation."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Text to tune dynamic evaluation on; default: the texts' beginning."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for results.json, results.md and plots."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Read at most this many; 0 = all.", min=0)] = 0,
    tuning_tokens: Annotated[int, typer.Option(help="Tune on at most this many.", min=1)] = 6000,
    segments: Annotated[
        str, typer.Option(help="Segments tried for dynamic evaluation.")
    ] = "128,32,16",
    threads: Annotated[int, typer.Option(help="Of PyTorch.", min=1)] = 1,
    shape: Annotated[
        str | None,
        typer.Option(help="Only count FLOPs of this shape: gpt2-small, or a config.json."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at OUTPUT.")] = False,
    json: JsonOption = False,
) -> None:
    """Compare standard inference, dynamic evaluation, and fast weights off and on.

    Perplexity and cost (seconds, counted FLOPs by part, peak memory), relative to standard
    inference of the same backbone, on the same blocks of text in turns, in PyTorch. Dynamic
    evaluation is that of Krause et al. (2018), with the SGD and the RMS rule, tuned.

    Example: fwl-export compare-adaptation demo play.txt --validation other.txt -o comparison
    """
    if shape is not None:
        _count(shape, json)
        return
    if checkpoint is None or not texts:
        raise typer.BadParameter("a checkpoint and at least one text file are needed, or --shape")
    from fwl_export.adaptation.compare import ComparisonPlan

    if output is not None:
        from fwl_export.files import check_output

        check_output(output, "a comparison", _is_comparison, force)
    numbers = [part.strip() for part in segments.split(",")]
    if not all(part.isdecimal() for part in numbers):
        raise typer.BadParameter(f"--segments is '{segments}'; expected numbers such as 128,32,16")
    plan = ComparisonPlan(tuple(map(int, numbers)), tuning_tokens, max_tokens)
    found = _compare(checkpoint, plain, texts, validation, plan, threads, output)
    if json:
        print_json(found.to_dict())
        return
    _print(found)
    if output is not None:
        print(f"wrote {output}: results.json, results.md, adaptation.png, adaptation.svg")


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
        print("\n" + textwrap.fill(note, 90))
    for part in (parts, *classes):
        print("\n" + table(*part))
    print("\n" + textwrap.fill(CLASS_NOTES, 90))


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
