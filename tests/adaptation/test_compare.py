"""Readers, costs, classes of tokens, the comparison, its report and plots, on random models."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fwl_export.adaptation import (
    PARTS,
    AdaptingReader,
    Comparison,
    ComparisonPlan,
    DynamicReader,
    PlainReader,
    compare,
    count_flops,
    count_parts,
    count_shape,
    gradient_rms,
    peak_memory,
    perplexity,
)
from fwl_export.adaptation import readers as reader_module
from fwl_export.adaptation.analysis import (
    FREQUENCIES,
    REPETITIONS,
    frequency_classes,
    gains_by_class,
    perplexity_by_position,
    repetition_classes,
)
from fwl_export.adaptation.compare import Texts, read_texts
from fwl_export.adaptation.cost import SHAPES
from fwl_export.adaptation.plots import write_plots
from fwl_export.adaptation.report import method_table, part_table, tables, to_markdown
from fwl_export.errors import TokenError
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.model.language_model import FWLModel
from tests.bundles import ANCHORED, TINY, VOCABULARY, tiny_model, write_checkpoint
from tests.tolerances import assert_close

SEGMENT = 8


@pytest.fixture(scope="module")
def model() -> FWLModel:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (129,), generator=torch.Generator().manual_seed(1))


def gradients(model: FWLModel, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a text's mean loss in a fresh reader, computed by autograd alone."""
    copied = copy.deepcopy(model).requires_grad_(True)
    loss = cross_entropy(copied.plain(text[None, :-1])[0], text[1:])
    torch.autograd.backward(loss)
    return {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}


def test_gradient_rms_is_that_of_its_segments(model: FWLModel, tokens: torch.Tensor) -> None:
    found = gradient_rms(model, tokens[: SEGMENT + 1], SEGMENT)
    for name, gradient in gradients(model, tokens[: SEGMENT + 1]).items():
        assert_close("model.float32_stream", found[name], gradient.abs(), name)
    twice = gradient_rms(model, tokens[: 2 * SEGMENT + 1], SEGMENT)
    assert any((twice[name] - found[name]).abs().max() > 1e-4 for name in found)


def test_rms_rule_and_decay_are_those_of_the_paper(model: FWLModel, tokens: torch.Tensor) -> None:
    rate, decay, text = 0.01, 0.05, tokens[: SEGMENT + 1]
    rms = gradient_rms(model, tokens[20:100], SEGMENT)
    mean = sum(float(r.sum()) for r in rms.values()) / sum(r.numel() for r in rms.values())
    reader = DynamicReader(model, SEGMENT, rate, decay, rms)
    start = dict(model.named_parameters())
    moved = {name: start[name] + 1 for name in rms}
    with torch.no_grad():
        for name, weight in reader.model.named_parameters():
            if name in moved:
                weight.copy_(moved[name])
    taken = gradients(reader.model, text)
    reader.read(text[None, :-1], text[None, 1:])
    for name, gradient in taken.items():
        step = gradient / (rms[name] + reader_module.RMS_EPSILON * mean)
        back = torch.clamp(decay * rms[name] / mean, max=1.0)
        expected = moved[name] + back * (start[name] - moved[name]) - rate * step
        assert_close("runtime.float32", reader.model.get_parameter(name).detach(), expected, name)
        assert (expected - moved[name]).abs().max() > 1e-3


def test_decay_of_the_sgd_rule_leads_back(model: FWLModel, tokens: torch.Tensor) -> None:
    text = tokens[: SEGMENT + 1]
    reader = DynamicReader(model, SEGMENT, 0.1, decay=1.0)
    for _ in range(2):  # with a decay of 1, only the last step is left
        before = gradients(reader.model, text)
        reader = _at_start_of_stream(reader)
        reader.read(text[None, :-1], text[None, 1:])
    for name, gradient in before.items():
        expected = model.get_parameter(name) - 0.1 * gradient
        assert_close("runtime.float32", reader.model.get_parameter(name).detach(), expected, name)


def _at_start_of_stream(reader: DynamicReader) -> DynamicReader:
    reader._position.zero_()
    reader._caches = [torch.zeros_like(cache) for cache in reader._caches]
    return reader


@pytest.mark.parametrize("anchor", [False, True])
def test_parts_are_the_products_of_the_model(anchor: bool, tokens: torch.Tensor) -> None:
    model = tiny_model(config=ANCHORED if anchor else TINY)
    length = 12
    text = tokens[: length + 1]
    plain = count_parts(PlainReader(model, length), length, text)
    parts = count_parts(AdaptingReader(model, max_tokens=length), length, text)
    assert set(plain) <= set(parts) <= set(PARTS)
    assert sum(parts.values()) == count_flops(
        AdaptingReader(model, max_tokens=length), length, text
    )
    once = 2 * length * 16 * VOCABULARY
    # The last position's slow logits wait for the fast ones, in one product.
    assert parts["slow logits, z U"] == once * (length - 1) // length
    assert parts["fast logits, z' U"] == once * (length + 1) // length
    assert parts["expected embedding, p U^T"] == once
    assert parts["backbone"] == plain["backbone"]
    layer = 2 * length * 16 * 32
    assert plain["slow layer"] == 2 * layer
    assert parts["fast second layer"] == layer
    # With an anchor, the slow pass and the gradient use what the anchor has learned.
    assert parts["slow layer"] == 2 * layer * (1 + anchor)
    assert parts["gradient"] == layer * (1 + anchor)
    within = 2 * 2 * length * length * (16 + 32)
    assert parts["update and read"] == 4 * layer + within
    dynamic = count_parts(DynamicReader(model, length, 0.1), length, text)
    assert set(dynamic) == {*plain, "backward"}
    assert dynamic["backward"] > 1.8 * sum(plain.values())
    assert "stream" not in vars(model.backbone), "the model is changed"


def test_a_shape_is_counted_as_its_model_is(model: FWLModel, tokens: torch.Tensor) -> None:
    found = count_shape(TINY, 12)
    for name, reader in (
        ("standard", PlainReader(model, 12)),
        ("adapting", AdaptingReader(model, max_tokens=12)),
    ):
        counted = count_parts(reader, 12, tokens[:25])
        assert found[name] == {part: count / 24 for part, count in counted.items()}


def test_gpt2_small_is_counted_without_weights() -> None:
    found = count_shape(SHAPES["gpt2-small"], 1)
    once = 2 * 768 * 50257
    for part in ("slow logits, z U", "fast logits, z' U", "expected embedding, p U^T"):
        assert found["adapting"][part] == once
    weights = 2 * (12 * 12 * 768**2 + 2 * 768 * 3072 + 768 * 50257)
    keys_and_values = 2 * 12 * 2 * 768 * 1024
    assert sum(found["standard"].values()) == weights + keys_and_values


def test_peak_memory_holds_weights_state_and_gradients(
    model: FWLModel, tokens: torch.Tensor
) -> None:
    weights = sum(p.nbytes for p in model.parameters())
    rms = gradient_rms(model, tokens[:40], SEGMENT)
    peaks = {
        name: peak_memory(start, SEGMENT, tokens[:33])
        for name, start in {
            "plain": lambda: PlainReader(model, SEGMENT),
            "fwl": lambda: AdaptingReader(model, max_tokens=SEGMENT),
            "sgd": lambda: DynamicReader(model, SEGMENT, 0.1),
            "decay": lambda: DynamicReader(model, SEGMENT, 0.1, 0.1),
            "rms": lambda: DynamicReader(model, SEGMENT, 0.1, 0.1, rms),
        }.items()
    }
    state = 2 * sum(s.bytes_per_row for s in AdaptingReader(model)._streaming.specs[5:])
    assert weights < peaks["plain"] < 3 * weights
    assert peaks["fwl"] > peaks["plain"] + state / 2
    learned = sum(r.nbytes for r in rms.values())  # all that has a gradient
    assert peaks["sgd"] > weights + learned
    assert peaks["decay"] >= peaks["sgd"] + weights
    assert peaks["rms"] >= peaks["decay"] + learned


def test_repetition_knows_tokens_and_pairs() -> None:
    found = repetition_classes(np.array([1, 2, 1, 2, 2, 3, 1, 2]))
    names = [REPETITIONS[i].removesuffix(" token") for i in found]
    new, known, pair = "new", "known token, new pair", "known pair"
    assert names == [new, known, pair, known, new, known, pair]


def test_frequency_is_counted_in_the_other_text() -> None:
    reference = np.concatenate([np.full(9_000, 0), np.full(980, 1), np.full(15, 2), np.full(5, 3)])
    found = frequency_classes(np.array([4, 3, 2, 1, 0]), reference, 5)
    assert [FREQUENCIES[i] for i in found] == [
        "never",
        "under 10",
        "10 to 100",
        "over 100",
        "over 100",
    ]


def test_gains_are_means_of_paired_differences() -> None:
    standard = np.array([4, 2, 3, 1], np.float32)
    other = np.array([1, 1, 4, 1], np.float32)
    first, second, empty = gains_by_class(
        ("a", "b", "c"), np.array([0, 0, 1, 1]), standard, {"x": other}
    )
    assert (first.tokens, first.loss) == (2, 3.0)
    assert first.gains["x"] == pytest.approx((2.0, 1.0))
    assert second.gains["x"] == pytest.approx((-0.5, 0.5))
    assert (empty.tokens, empty.loss, empty.gains) == (0, None, {})


def test_perplexity_by_position_covers_the_stream() -> None:
    losses = np.log(np.array([2, 2, 8, 8, 8], np.float32))
    position, values = perplexity_by_position(losses, 2)
    assert position.tolist() == [1.5, 4.0]
    assert values == pytest.approx([2 ** (2 / 3) * 8 ** (1 / 3), 8])


@pytest.fixture(scope="module")
def found(model: FWLModel) -> Comparison:
    generator = torch.Generator().manual_seed(3)
    stream = torch.randint(0, VOCABULARY, (1200,), generator=generator)
    validation = torch.randint(0, VOCABULARY, (400,), generator=generator)
    texts = Texts(["a.txt", "b.txt"], [0, 700], stream, validation, "c.txt")
    return compare(model, tiny_model(1), texts, ComparisonPlan((64, 32), 400))


def test_comparison_measures_every_way_on_the_same_stream(
    found: Comparison, model: FWLModel
) -> None:
    assert list(found.methods) == ["standard", "off", "adapting", "sgd", "rms"]
    stream = found.texts.stream
    for key, expected in (("standard", tiny_model(1)), ("off", model)):
        losses = cross_entropy(expected.plain(stream[None, :-1])[0], stream[1:])
        assert found.methods[key].perplexity == pytest.approx(math.exp(losses), rel=1e-4)
    adapted, _ = model(stream[None, :-1], stream[None, 1:])
    losses = cross_entropy(adapted[0], stream[1:], reduction="none")
    assert_close("runtime.float32", found.methods["adapting"].losses, losses)
    for rule in ("sgd", "rms"):
        tuned = found.tuning[rule]
        assert found.methods[rule].tokens_per_call == tuned["segment"]
        best = min(trial["perplexity"] for trial in tuned["trials"])
        (chosen,) = [
            trial["perplexity"]
            for trial in tuned["trials"]
            if all(trial[n] == tuned[n] for n in ("segment", "learning_rate", "decay"))
        ]
        assert chosen == best
    base = found.methods["standard"]
    assert base.time_ratio == (1, 1, 1)
    assert base.flops_ratio == base.memory_ratio == base.decode_ratio == 1
    assert found.methods["off"].flops_ratio == 1
    assert found.methods["adapting"].flops_ratio > 1
    parts = dict(found.methods["sgd"].flops_by_part)
    assert parts.pop("backward") > 1.8 * sum(parts.values())
    assert sum(part.tokens for part in found.frequency) == len(stream) - 1
    assert sum(part.tokens for part in found.repetition) == len(stream) - 1


def test_report_says_what_was_measured(found: Comparison) -> None:
    text = to_markdown(found)
    for method in found.methods.values():
        assert f"| {method.name} | {method.perplexity:.2f} |" in text
    assert "a.txt, b.txt: 1199 tokens predicted" in text
    assert "tuned on c.txt (400 tokens)" in text.replace("\n", " ")
    assert len(tables(found)) == 4
    header, rows = part_table({"x": {"backbone": 2e6}, "y": {"backbone": 2e6, "gradient": 1e6}})
    assert header == ["million FLOPs per token", "x", "y"]
    assert rows == [
        ["backbone", "2.00", "2.00"],
        ["gradient", "", "1.00"],
        ["total", "2.00", "3.00"],
        ["relative", "1.00", "1.50"],
    ]


def test_divergence_is_reported_and_files_stay_valid(found: Comparison, tmp_path: Path) -> None:
    losses = np.full_like(found.methods["sgd"].losses, np.nan)
    sgd = dataclasses.replace(found.methods["sgd"], losses=losses, perplexity=perplexity(losses))
    broken = dataclasses.replace(found, methods={**found.methods, "sgd": sgd})
    _, rows = method_table(broken)
    assert rows[3][1:3] == ["infinite", "infinite"]
    assert (
        json.loads(json.dumps(broken.to_dict(), allow_nan=False))["methods"]["sgd"]["perplexity"]
        is None
    )
    write_plots(broken, tmp_path)


def test_plots_are_written_in_both_formats(found: Comparison, tmp_path: Path) -> None:
    write_plots(found, tmp_path)
    assert (tmp_path / "adaptation.svg").read_text().startswith("<?xml")
    assert int.from_bytes((tmp_path / "adaptation.png").read_bytes()[16:20], "big") == 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_texts_are_one_stream_and_tuned_on_what_is_left_out(
    checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_checkpoint(checkpoint)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("ABC" * 300)
    files[1].write_text("XY" * 500)
    read = read_texts(loaded, files, None, ComparisonPlan((32,), 300))
    assert (len(read.stream), len(read.validation)) == (1600, 300)
    assert read.starts == [0, 600]
    assert read.stream[599] != read.stream[600] == ord("X") - 32
    shorter = read_texts(loaded, files, files[1], ComparisonPlan((32,), 300, 1100))
    assert (len(shorter.stream), shorter.starts, len(shorter.validation)) == (1100, [0, 900], 300)
    assert shorter.validation_name == "b.txt"


def test_too_little_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text("A" * 100)
    long.write_text("A" * 3000)
    with pytest.raises(TokenError, match="the texts leave 100 tokens to read; expected 1025"):
        read_texts(loaded, [short], long, ComparisonPlan())
    with pytest.raises(TokenError, match="the texts leave 900 tokens to read"):
        read_texts(loaded, [long], long, ComparisonPlan(max_tokens=900))
    with pytest.raises(TokenError, match="leaves 100 tokens to tune on; expected more than 512"):
        read_texts(loaded, [long], short, ComparisonPlan())
    with pytest.raises(TokenError, match=r"segments are \[100\]; expected divisors of 256"):
        ComparisonPlan((100,))
