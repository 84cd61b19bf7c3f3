"""The central identity: however a text is split into calls, it equals the parallel form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fwl_export.model.backbones.decoder import rotate
from fwl_export.model.language_model import FWLModel
from fwl_export.model.streaming import StreamingModel
from fwl_export.precision.policy import in_precision
from tests.model.models import VARIANTS, VOCABULARY, small_model
from tests.tolerances import assert_close

MAX_TOKENS = 9


def fresh(streaming: StreamingModel, rows: int) -> list[Tensor]:
    return [
        torch.zeros(rows, *spec.shape, dtype=getattr(torch, spec.dtype)) for spec in streaming.specs
    ]


def read(
    streaming: StreamingModel,
    ids: Tensor,
    weights: Tensor,
    calls: list[list[int]],
    state: list[Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """Read ids [B, T] in calls of `calls[i][row]` tokens per row; garbage pads shorter rows."""
    rows = len(ids)
    state = state or fresh(streaming, rows)
    position, outputs = [0] * rows, [[] for _ in range(rows)]
    for lengths in uncrossed(calls, streaming.model.config.fast_weights.anchor_interval):
        size = max([*lengths, 1])
        tokens = torch.randint(0, VOCABULARY, (rows, size))
        label_weights = torch.rand(rows, size, dtype=weights.dtype)
        for row, length in enumerate(lengths):
            part = slice(position[row], position[row] + length)
            tokens[row, :length] = ids[row, part]
            label_weights[row, :length] = weights[row, part]
        positions = torch.arange(size).repeat(rows, 1)
        logits, *present = streaming(
            tokens,
            label_weights,
            torch.tensor(lengths),
            positions,
            torch.full((rows,), scale),
            *state,
        )
        for row, length in enumerate(lengths):
            outputs[row].append(logits[row, :length])
            position[row] += length
            if length == 0:
                for spec, old, new in zip(streaming.specs, state, present, strict=True):
                    assert torch.equal(old[row], new[row]), f"{spec.name} of an idle row changed"
        state = list(present)
    return torch.stack([torch.cat(parts) for parts in outputs]), state


def uncrossed(calls: list[list[int]], interval: int) -> list[list[int]]:
    """Split calls so that no row crosses a position that the interval divides."""
    position = np.zeros(len(calls[0]), np.int64)
    found = []
    for call in calls:
        left = np.array(call)
        while True:
            now = np.minimum(left, interval - position % interval) if interval else left
            found.append(now.tolist())
            position, left = position + now, left - now
            if not left.any():
                break
    return found


def parallel(model: FWLModel, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the logits of the parallel form, where each label has the weight of its token."""
    return model.fast_weights.parallel(
        model.backbone(ids[:, :-1]), ids[:, 1:], weights[:, 1:], chunk=16
    )[0]


@st.composite
def splits(draw: st.DrawFn, length: int, rows: int) -> list[list[int]]:
    """Draw calls that give each row `length` tokens, at most MAX_TOKENS at a time."""
    left, calls = [length] * rows, []
    while any(left):
        call = [draw(st.integers(0, min(MAX_TOKENS, rest))) for rest in left]
        if not any(call):  # at least one row moves in every call, so that the loop ends
            row = next(i for i, rest in enumerate(left) if rest)
            call[row] = 1
        calls.append(call)
        left = [rest - now for rest, now in zip(left, call, strict=True)]
    return calls


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_split_gives_the_parallel_result(variant: str, data: st.DataObject) -> None:
    model = small_model(variant)
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.randint(0, VOCABULARY, (rows, length + 1))
    weights = torch.rand(rows, length + 1, dtype=torch.float64).round(decimals=1)
    expected = parallel(model, ids, weights)
    streaming = StreamingModel(model, MAX_TOKENS)
    calls = data.draw(splits(length, rows))
    logits, _ = read(streaming, ids[:, :-1], weights[:, :-1], calls)
    assert_close("model.float64", logits, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_final_state_does_not_depend_on_the_split(variant: str) -> None:
    model = small_model(variant)
    streaming = StreamingModel(model, MAX_TOKENS)
    ids = torch.randint(0, VOCABULARY, (1, 45))
    weights = torch.ones(1, 45, dtype=torch.float64)
    _, one_by_one = read(streaming, ids, weights, [[1]] * 45)
    _, in_blocks = read(streaming, ids, weights, [[9]] * 5)
    _, uneven = read(streaming, ids, weights, [[2], [9], [1], [9], [9], [6], [9]])
    for spec, a, b, c in zip(streaming.specs, one_by_one, in_blocks, uneven, strict=True):
        assert_close("model.float64", b, a, spec.name)
        assert_close("model.float64", c, a, spec.name)
    assert max(float(tensor.abs().max()) for tensor in one_by_one[5:]) > 0.1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_backbone_streams_far_beyond_its_ring_buffer(norm: str) -> None:
    model = small_model(norm=norm)
    ids = torch.randint(0, VOCABULARY, (2, 301))
    weights = torch.ones(2, 301, dtype=torch.float64)
    calls = [[7, 7]] * 42 + [[6, 6]]
    logits, _ = read(StreamingModel(model, 7), ids[:, :-1], weights[:, :-1], calls)
    assert_close("model.float64", logits, parallel(model, ids, weights))


def test_a_call_across_an_anchor_gives_nan() -> None:
    streaming = StreamingModel(small_model("anchor"), MAX_TOKENS)
    state = fresh(streaming, 2)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    weights = torch.ones(2, 9, dtype=torch.float64)
    positions, ones = torch.arange(9).repeat(2, 1), torch.ones(2)
    _, *state = streaming(ids, weights, torch.tensor([9, 3]), positions, ones, *state)
    logits, *_ = streaming(ids, weights, torch.tensor([4, 9]), positions, ones, *state)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all(), "the other row ends at its anchor"


def test_logits_of_some_positions_are_those_of_all() -> None:
    streaming = StreamingModel(small_model(), MAX_TOKENS)
    ids, weights = torch.randint(0, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.float64)
    lengths, ones = torch.tensor([9, 4]), torch.ones(2)
    every, *after = streaming(
        ids, weights, lengths, torch.arange(9).repeat(2, 1), ones, *fresh(streaming, 2)
    )
    for chosen in (torch.tensor([[8], [3]]), torch.tensor([[0, 7], [3, 3]])):
        logits, *state = streaming(ids, weights, lengths, chosen, ones, *fresh(streaming, 2))
        expected = torch.stack([every[row, places] for row, places in enumerate(chosen)])
        assert_close("model.float64", logits, expected)
        assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


@pytest.mark.parametrize(("length", "passes"), [(1, [0, 2]), (2, [1, 2]), (9, [8, 2])])
def test_the_last_position_s_slow_logits_share_a_pass_with_the_fast_ones(
    length: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    streaming = StreamingModel(small_model(), MAX_TOKENS)
    layer = streaming.model.fast_weights
    rows = []

    def logits(output: Tensor) -> Tensor:
        rows.append(output.shape[1])
        return type(layer).logits(layer, output)

    monkeypatch.setattr(layer, "logits", logits)
    ids, weights = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length)
    last = torch.tensor([[length - 1]])
    streaming(ids, weights, torch.tensor([length]), last, torch.ones(1), *fresh(streaming, 1))
    assert rows == passes


def test_rows_do_not_see_each_other() -> None:
    streaming = StreamingModel(small_model(), MAX_TOKENS)
    ids = torch.randint(0, VOCABULARY, (3, 20))
    weights = torch.ones(3, 20, dtype=torch.float64)
    together, _ = read(streaming, ids, weights, [[9, 2, 5], [9, 9, 6], [2, 9, 9]])
    for row in range(3):
        alone, _ = read(streaming, ids[row : row + 1], weights[:1], [[9], [9], [2]])
        assert_close("model.float64", together[row], alone[0])


def test_reading_without_learning_keeps_the_fast_weights() -> None:
    streaming = StreamingModel(small_model(), MAX_TOKENS)
    ids = torch.randint(0, VOCABULARY, (1, 18))
    _, learned = read(streaming, ids, torch.ones(1, 18, dtype=torch.float64), [[9], [9]])
    silent = torch.zeros(1, 18, dtype=torch.float64)
    _, after = read(streaming, ids, silent, [[9], [9]], state=learned)
    for spec, before, now in zip(streaming.specs, learned, after, strict=True):
        if spec.name.startswith("fast."):
            assert torch.equal(before, now), spec.name
            assert before.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_learning_rate_scale_is_a_factor_of_the_step_sizes(variant: str) -> None:
    model, scaled = small_model(variant), small_model(variant)
    for step in scaled.fast_weights.steps.values():
        step.mul_(0.5)
    ids = torch.randint(0, VOCABULARY, (1, 30))
    weights = torch.rand(1, 30, dtype=torch.float64)
    calls = [[9], [1], [9], [9], [2]]
    half, _ = read(StreamingModel(model, MAX_TOKENS), ids, weights, calls, scale=0.5)
    expected, _ = read(StreamingModel(scaled, MAX_TOKENS), ids, weights, calls)
    whole, _ = read(StreamingModel(model, MAX_TOKENS), ids, weights, calls)
    assert_close("model.float64", half, expected)
    assert (half - whole).abs().max() > 0.01


def test_what_was_learned_stays_when_the_learning_rate_changes() -> None:
    model = small_model("tensorflow")  # it has no decay
    streaming = StreamingModel(model, MAX_TOKENS)
    ids, ones = torch.randint(0, VOCABULARY, (1, 18)), torch.ones(1, 18, dtype=torch.float64)
    _, learned = read(streaming, ids, ones, [[9], [9]])
    _, after = read(streaming, ids, ones, [[9], [9]], state=learned, scale=0.0)
    for spec, before, now in zip(streaming.specs, learned, after, strict=True):
        if spec.name.startswith("fast."):
            assert torch.equal(before, now), spec.name


def test_float32_stays_near_float64_over_2000_tokens() -> None:
    double = small_model()
    single = in_precision(double.float(), "fp32")
    double = small_model()
    ids = torch.randint(0, VOCABULARY, (1, 2000))
    calls = [[8]] * 250
    exact, _ = read(StreamingModel(double, 8), ids, torch.ones(1, 2000, dtype=torch.float64), calls)
    near, _ = read(StreamingModel(single, 8), ids, torch.ones(1, 2000), calls)
    assert near.dtype == torch.float32
    assert_close("model.float32_stream", near, exact)


def test_half_precision_keeps_sums_in_float32() -> None:
    half = in_precision(small_model().float(), "fp16")
    streaming = StreamingModel(half, MAX_TOKENS)
    types = {spec.name: spec.dtype for spec in streaming.specs}
    assert types["cache.0.key"] == types["pending.hidden"] == "float16"
    assert all(types[name] == "float32" for name in types if name.startswith("fast."))
    ids = torch.randint(0, VOCABULARY, (1, 36))
    logits, state = read(streaming, ids, torch.ones(1, 36), [[9]] * 4)
    assert logits.dtype == torch.float32
    for spec, tensor in zip(streaming.specs, state, strict=True):
        assert str(tensor.dtype) == f"torch.{spec.dtype}", spec.name
    exact, _ = read(
        StreamingModel(small_model(), MAX_TOKENS),
        ids,
        torch.ones(1, 36, dtype=torch.float64),
        [[9]] * 4,
    )
    assert_close("model.float16_stream", logits, exact)


def test_rotary_phases_are_exact_after_a_billion_tokens() -> None:
    backbone = small_model().float().backbone
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(position: int) -> Tensor:
        """Return query . key for a key at the position and a query 3 tokens later."""
        rotary = [backbone.rotary(torch.tensor([[position + i]]), torch.float32) for i in (3, 0)]
        return (rotate(query, rotary[0]) * rotate(key, rotary[1])).sum()

    assert_close("model.rotary", score(10**9), score(0))
