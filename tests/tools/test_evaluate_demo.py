"""The readers, tuning, statistics and report of tools/evaluate_demo.py, on tiny random models."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fwl_export.adaptation import (
    AdaptingReader,
    DynamicReader,
    PlainReader,
    count_flops,
    iterate_losses,
    linear_attention_flops,
    minimize_on_grid,
    perplexity,
    read_interleaved,
)
from fwl_export.adaptation.plots import spread_apart
from fwl_export.bundle.config import BackboneConfig, FastWeightsConfig, ModelConfig
from fwl_export.errors import OutputExistsError
from fwl_export.json_files import without_non_finite
from fwl_export.model.language_model import FWLModel
from fwl_export.op import torch_op
from tools import evaluate_demo, evaluation_report
from tools.stream_readers import anchored, paper_form

VOCAB = 40
# Rounding of float32 sums taken in another order, over a few hundred tokens.
SAME = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture(scope="module")
def model() -> FWLModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB,
        backbone=BackboneConfig(width=16, layers=2, heads=2, window=8, mlp_ratio=2),
        fast_weights=FastWeightsConfig(input_size=16, hidden_size=24, output_size=16),
    )
    model = FWLModel(config)
    with torch.no_grad():
        model.fast_weights.horizon.fill_(60.0)
        for step in model.fast_weights.steps.values():
            step.fill_(3e-2)
        for block in model.backbone.blocks:  # zero at the start of a training
            torch.nn.init.normal_(block.attention.out.weight, std=0.2)
            torch.nn.init.normal_(block.down.weight, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (601,), generator=torch.Generator().manual_seed(1))


def losses_of(reader, tokens, chunk):
    return np.concatenate(list(iterate_losses(reader, tokens, chunk)))


def expected_losses(logits, tokens):
    return cross_entropy(logits[0], tokens[1:], reduction="none").numpy()


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_plain_reader_equals_the_parallel_form(model, tokens, chunk):
    text = tokens[:120]
    expected = expected_losses(model.plain(text[None, :-1]), text)
    found = losses_of(PlainReader(model, chunk), text, chunk)
    np.testing.assert_allclose(found, expected, **SAME)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_adapting_reader_equals_the_parallel_form(model, tokens, chunk):
    text = tokens[:120]
    adapted, slow = model(text[None, :-1], text[None, 1:])
    found = losses_of(AdaptingReader(model), text, chunk)
    np.testing.assert_allclose(found, expected_losses(adapted, text), **SAME)
    assert np.abs(found - expected_losses(slow, text)).max() > 0.01


def test_adaptation_off_differs_from_adapting_only_after_the_first_token(model, tokens):
    off = losses_of(PlainReader(model), tokens, 256)
    on = losses_of(AdaptingReader(model), tokens, 256)
    np.testing.assert_allclose(on[0], off[0], **SAME)
    assert abs(on[1] - off[1]) > 1e-5


def test_an_anchored_model_has_the_same_weights_and_scaled_steps(model, tokens):
    read = anchored(model, 32, 0.5, 4.0)
    layer, trained = read.fast_weights, model.fast_weights
    assert read.config.fast_weights.anchor_interval == 32
    assert layer.horizon == 4 * trained.horizon
    assert layer.steps["up_kernel"] == 0.5 * trained.steps["up_kernel"]
    assert torch.equal(layer.up_kernel, trained.up_kernel)
    text = tokens[:150]
    adapted, _ = read(text[None, :-1], text[None, 1:])
    found = losses_of(AdaptingReader(read), text, 256)
    np.testing.assert_allclose(found, expected_losses(adapted.detach(), text), **SAME)


def test_the_paper_form_has_the_same_weights_and_no_decay(model, tokens):
    pure = paper_form(model)
    assert pure.config.fast_weights.decay == "none"
    torch.testing.assert_close(pure.fast_weights.unembed, model.fast_weights.unembed)
    text = tokens[:120]
    with torch.no_grad():
        adapted, _ = pure(text[None, :-1], text[None, 1:])
    found = losses_of(AdaptingReader(pure), text, 40)
    np.testing.assert_allclose(found, expected_losses(adapted, text), **SAME)
    assert np.abs(found - losses_of(AdaptingReader(model), text, 40)).max() > 1e-3


def test_reset_forgets_the_sums_and_keeps_caches_and_pending_gradient(model, tokens):
    pure = paper_form(model)
    text = tokens[:81]
    found = losses_of(AdaptingReader(pure, reset_every=40), text, 20)
    never = losses_of(AdaptingReader(pure), text, 20)
    np.testing.assert_allclose(found[:40], never[:40], **SAME)
    # After the reset the model learns from the start, but for one pending gradient.
    weights = (torch.arange(80) >= 39).float()[None]
    with torch.no_grad():
        adapted, _ = pure(text[None, :-1], text[None, 1:], weights)
    np.testing.assert_allclose(found[40:], expected_losses(adapted, text)[40:], **SAME)
    assert np.abs(found[40:] - never[40:]).max() > 1e-3


def test_a_call_across_a_reset_is_refused(model, tokens):
    reader = AdaptingReader(model, reset_every=10)
    with pytest.raises(ValueError, match="a call of 8 tokens at 8 crosses a reset, due every 10"):
        losses_of(reader, tokens, 8)


def test_dynamic_reader_steps_on_the_mean_loss_of_what_it_has_predicted(model, tokens):
    segment, rate = 8, 0.5
    text = tokens[: segment + 1]
    reader = DynamicReader(model, segment, rate)
    first = losses_of(reader, text, segment)
    np.testing.assert_allclose(first, losses_of(PlainReader(model), text, segment), **SAME)

    weights = {name: p.clone().requires_grad_(True) for name, p in model.named_parameters()}
    logits = torch.func.functional_call(_Plain(model), _prefixed(weights), (text[None, :-1],))
    used = {n: p for n, p in weights.items() if not n.endswith("horizon") and ".steps." not in n}
    grads = torch.autograd.grad(cross_entropy(logits[0], text[1:]), list(used.values()))
    for (name, weight), grad in zip(used.items(), grads, strict=True):
        found = reader.model.get_parameter(name)
        torch.testing.assert_close(found, weight - rate * grad, **SAME)
        assert grad.abs().max() > 0


class _Plain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids):
        return self.inner.plain(input_ids)


def _prefixed(weights):
    return {f"inner.{name}": weight for name, weight in weights.items()}


def test_dynamic_reader_leaves_the_model_alone_and_carries_its_weights(model, tokens):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    still = losses_of(DynamicReader(model, 16, 0.0), tokens[:97], 16)
    moving = losses_of(DynamicReader(model, 16, 0.5), tokens[:97], 16)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    np.testing.assert_allclose(still, losses_of(PlainReader(model), tokens[:97], 16), **SAME)
    np.testing.assert_allclose(moving[:16], still[:16], **SAME)
    assert np.abs(moving[16:] - still[16:]).max() > 1e-3


def test_dynamic_evaluation_learns_a_repeated_text(model, tokens):
    text = tokens[:32].repeat(20)
    found = losses_of(DynamicReader(model, 32, 0.3), text, 32)
    assert found[-32:].mean() < found[:32].mean() - 1


@pytest.mark.parametrize("length", [1, 2, 128, 129, 300])
def test_flops_of_the_op_are_those_of_its_matrix_products(length):
    shape = {"query": (2, length, 5), "key": (2, length, 5), "value": (2, length, 7)}
    inputs = [torch.randn(s) for s in shape.values()]
    inputs += [torch.rand(2, length), torch.randn(2, 5, 7)]
    with FlopCounterMode(display=False) as hidden:
        torch_op.linear_attention_update(*inputs)
    assert hidden.get_total_flops() == 0  # if this fails, the formula is no longer needed
    with FlopCounterMode(display=False) as inside:
        torch_op._op._init_fn(*inputs)
    assert linear_attention_flops(*map(list, shape.values())) == inside.get_total_flops() > 0


def test_flops_of_reading_are_those_of_the_layers(model, tokens):
    length = 16
    plain = count_flops(PlainReader(model, length), length, tokens[: length + 1])
    width, window, hidden = 16, 8, 24
    per_block = width * 3 * width + width * width + 2 * width * 2 * width
    attention = 2 * width * (window + length - 1)  # the whole ring buffer, masked or not
    layer = width * hidden + hidden * width + width * VOCAB
    assert plain == 2 * length * (2 * (per_block + attention) + layer)
    adapting = count_flops(AdaptingReader(model, max_tokens=length), length, tokens[: length + 1])
    # At least the slow pass beside the fast one, the expected embedding, one product of the
    # gradient, and an update and a read of both matrices.
    more = hidden * width + 2 * width * VOCAB + hidden * width + 4 * width * hidden
    assert adapting - plain >= 2 * length * more
    dynamic = count_flops(DynamicReader(model, length, 0.1), length, tokens[: length + 1])
    assert 2.8 * plain < dynamic <= 3 * plain  # each forward product has two in the backward pass


def test_blocks_are_read_and_timed_in_pairs(model, tokens):
    readers = {"a": (PlainReader(model, 4), 4), "c": (AdaptingReader(model, max_tokens=4), 1)}
    found = read_interleaved(readers, tokens[:45], block=8)
    assert {name: len(reading.seconds) for name, reading in found.items()} == {"a": 5, "c": 5}
    assert all(value > 0 for reading in found.values() for value in reading.seconds)
    alone = losses_of(AdaptingReader(model, max_tokens=4), tokens[:45], 1)
    np.testing.assert_array_equal(found["c"].losses, alone)
    assert len(found["a"].losses) == 44  # the last, shorter block is included


def test_a_diverged_perplexity_is_infinite():
    assert perplexity(np.array([math.log(2), math.log(8)])) == pytest.approx(4)
    assert perplexity(np.array([1.0, math.nan])) == math.inf
    assert perplexity(np.array([1e4])) == math.inf


def test_grid_grows_until_the_best_point_lies_inside():
    tried = []

    def cost(rate: float) -> float:
        tried.append(rate)
        return math.inf if rate > 20 else (math.log(rate) - math.log(7)) ** 2

    best, interior = minimize_on_grid(cost, 0.1, 10**0.5)
    assert interior
    assert abs(math.log(best / 7)) <= math.log(10) / 4 + 1e-3
    assert len(tried) == len(set(tried))
    assert min(tried) < best < max(tried)


def test_grid_says_where_no_inner_point_is_best():
    best, interior = minimize_on_grid(lambda rate: rate, 1.0, 2.0, max_moves=3)
    assert (best, interior) == (0.125, False)


def test_growth_is_found_only_where_there_is_some():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 60_000)
    position = np.arange(60_000) / 10_000
    growing = evaluation_report.growth(noise + 0.05 * position, 4000)
    assert growing["grows"]
    assert growing["enough_tokens"]
    whole = growing["whole_stream"]
    assert abs(whole["slope_per_10k"] - 0.05) < 3 * whole["standard_error"]
    # Independent tokens: the error of a slope over n bins of 4000.
    centers = (np.arange(15) + 0.5) * 0.4
    expected = 1 / math.sqrt(4000) / math.sqrt(((centers - centers.mean()) ** 2).sum())
    assert whole["standard_error"] == pytest.approx(expected, rel=0.5)
    assert not evaluation_report.growth(noise - 0.05 * position, 4000)["grows"]
    # A dip while the model first learns must not hide growth after it.
    dip = np.where(position < 1, 2.0, 0.05 * position)
    assert evaluation_report.growth(noise + dip, 4000)["grows"]
    assert not evaluation_report.growth(noise[:5000], 4000)["enough_tokens"]
    noise[-1] = math.nan
    assert evaluation_report.growth(noise, 4000)["grows"]


def test_labels_are_spread_apart():
    placed = spread_apart(np.array([0.1, 0.12, 0.13, 0.9]), 0.15)
    assert np.all(np.diff(placed) >= 0.15 - 1e-6)
    assert placed[3] == 0.9
    assert placed[:3].mean() == pytest.approx(0.35 / 3)


def workspace(folder, **settings) -> evaluate_demo.Workspace:
    return evaluate_demo.Workspace(folder, settings, Console(file=io.StringIO()))


PLAN = evaluate_demo.EvaluationPlan(None, None, 200, (32, 16), (256, None), 64, 100, 2)


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(2)
    plays = {name: torch.randint(0, VOCAB, (600,), generator=generator) for name in ("x", "y_z")}
    validation = torch.randint(0, VOCAB, (300,), generator=generator)
    torch.manual_seed(5)
    plain = FWLModel(model.config).eval()

    def run(work):
        return evaluate_demo.evaluate(plain, model, plays, validation, PLAN, work)

    return folder, run, run(workspace(folder, text=1)), (plain, model, plays)


def test_evaluation_measures_all_rows(evaluated):
    _, _, results, (plain, model, plays) = evaluated
    stream = torch.cat(list(plays.values()))
    assert results["tokens"]["predicted"] == 1199
    assert tuple(results["rows"]) == ("a", "b", "c", "c0", "c'", "d")
    expected = expected_losses(plain.plain(stream[None, :-1]).detach(), stream)
    row = results["rows"]["a"]
    assert row["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert row["plays"]["x"] == pytest.approx(math.exp(expected[:599].mean()), rel=1e-4)
    assert row["plays"]["y_z"] == pytest.approx(math.exp(expected[599:].mean()), rel=1e-4)
    adapted, _ = model(stream[None, :-1], stream[None, 1:])
    losses = expected_losses(adapted, stream)
    assert results["rows"]["c0"]["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-3)
    bins = results["position"]["mean_loss"]["c0"]
    np.testing.assert_allclose(bins, losses[:1100].reshape(11, 100).mean(1), rtol=1e-3)
    tuned = results["tuning"]["anchor"]
    assert tuned["interval"] == 64
    read = anchored(model, 64, tuned["step_factor"], tuned["horizon_factor"])
    adapted, _ = read(stream[None, :-1], stream[None, 1:])
    expected = math.exp(expected_losses(adapted.detach(), stream).mean())
    assert results["rows"]["c"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    best = min(tuned["trials"], key=lambda trial: trial["perplexity"])
    assert best["step_factor"] == tuned["step_factor"]
    assert set(results["cost"]["chunk"]["rows"]) == {"a", "b", "c", "c0", "d"}
    assert set(results["cost"]["decode"]["rows"]) == {"a", "c", "c0"}
    assert results["cost"]["chunk"]["rows"]["b"]["flops_ratio"] == 1


def test_evaluation_resumes_from_finished_parts(evaluated, model, monkeypatch):
    folder, run, results, _ = evaluated

    def fail(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(PlainReader, "read", fail)
        patch.setattr(DynamicReader, "read", fail)
        patch.setattr(AdaptingReader, "read", fail)
        again = run(workspace(folder, text=1))
    assert without_non_finite(again) == without_non_finite(results)


def test_parts_of_another_evaluation_are_refused(evaluated):
    folder, *_ = evaluated
    with pytest.raises(OutputExistsError, match="holds parts of an evaluation of other check"):
        workspace(folder, text=2)


def test_report_fits_and_shows_what_was_measured(evaluated, model, tmp_path):
    _, _, results, _ = evaluated
    results = results | {
        "parameters": 3_300_000,
        "fwl": {"horizon": 60.0},
        "machine": evaluate_demo.machine(),
    }
    evaluate_demo.write_json(tmp_path / "results.json", results)
    results = json.loads((tmp_path / "results.json").read_text())
    text = evaluation_report.results_markdown(results)
    assert max(map(len, text.splitlines())) <= 90, text
    for row in results["rows"].values():
        assert f"| {row['perplexity']:.2f} |" in text
    evaluation_report.plot_perplexity(results, tmp_path)
    assert (tmp_path / "perplexity.svg").read_text().startswith("<?xml")
    header = (tmp_path / "perplexity.png").read_bytes()[16:20]
    assert int.from_bytes(header, "big") == 800


def test_json_has_no_number_that_is_not_finite(tmp_path):
    path = tmp_path / "value.json"
    evaluate_demo.write_json(path, {"x": [math.inf, 1.0], "y": {"z": math.nan}})
    assert json.loads(path.read_text()) == {"x": [None, 1.0], "y": {"z": None}}
