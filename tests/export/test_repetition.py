"""Every export below float32 reads repeated tokens, and fails where they are not finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fwl_export.bundle.manifest import MODEL_FILE, read_bundle
from fwl_export.bundle.repetition import Repetition
from fwl_export.errors import ExportError
from fwl_export.export import export_bundle, write_bundle
from fwl_export.export.repetition import NotFinite, RepeatedReading, refusal
from fwl_export.model.checkpoint import load_checkpoint
from fwl_export.precision.policy import PrecisionPolicy, parts
from fwl_export.runtimes import open_session
from tests.bundles import MAX_TOKENS, write_checkpoint
from tests.parity import faults
from tests.parity.faults import broken_bundle

TEXTS = [Repetition("newline", (5,)), Repetition("two tokens in turn", (7, 9))]


def reading(bundle: Path) -> RepeatedReading:
    manifest = read_bundle(bundle).manifest
    return RepeatedReading.of(bundle / MODEL_FILE, manifest.state, manifest.config, MAX_TOKENS)


@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_fp16", "anchored_bundle"])
def test_an_unbroken_model_reads_on(bundle: str, request: pytest.FixtureRequest) -> None:
    assert reading(request.getfixturevalue(bundle)).first_not_finite(TEXTS, 100) is None


def test_the_first_token_is_that_at_which_a_session_fails(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    broken = broken_bundle(tiny_bundle, tmp_path / "b", faults.update_through_half(1, 64))
    found = reading(broken.folder).first_not_finite(TEXTS)
    assert found is not None
    assert found.tensor == "logits"
    session = open_session(broken, threads=1, plugin="none")
    session.feed(found.text.read(0, found.token))
    assert found.token_id == found.text.read(found.token, 1)[0]
    with pytest.raises(Exception, match="not finite"):
        session.feed([found.token_id])


def test_a_state_that_is_not_finite_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    fault = faults.not_a_number("fast.down.bias", 20)
    broken = broken_bundle(tiny_bundle, tmp_path / "b", fault)
    found = reading(broken.folder).first_not_finite(TEXTS, 40)
    assert found is not None
    assert found.tensor == "fast.down.bias"


def test_calls_end_at_anchors_and_at_the_last_position(anchored_bundle: Path) -> None:
    made = reading(anchored_bundle)
    assert list(made._calls(40)) == [(0, 12), (12, 12), (24, 12), (36, 4)]


def test_the_export_fails_and_names_token_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = write_bundle.export_onnx

    def faulty(*arguments: object, **options: object) -> object:
        specs = exported(*arguments, **options)  # type: ignore[arg-type]
        path = arguments[1]
        assert isinstance(path, Path)
        model = onnx.load(str(path))
        name = faults.updates(model)[1].output[0]
        faults.through_half(name, 1024)(model)
        onnx.save(model, str(path))
        return specs

    monkeypatch.setattr(write_bundle, "export_onnx", faulty)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    names = list(parts(load_checkpoint(checkpoint).model, "int8w"))
    policy = PrecisionPolicy("int8w", names, [])
    with pytest.raises(ExportError) as error:
        export_bundle(checkpoint, tmp_path / "b", max_tokens=MAX_TOKENS, policy=policy)
    message = str(error.value)
    assert message.startswith("in int8w the model is not finite on a text that repeats one thing (")
    assert "logits after token" in message
    assert "Nothing was written: leave more parts in float32, see `fwl-export prec" in message
    assert not (tmp_path / "b").exists()


def test_what_can_be_done_depends_on_the_precision() -> None:
    found = NotFinite(TEXTS[1], 3, "logits")
    message = str(refusal(found, "fp16", "-"))
    assert "(two tokens in turn, token id 9, text '-'): logits after token 3 has NaN" in message
    assert "export with --precision fp32, or with a policy of `fwl-export precision`" in message


def test_float32_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_bundle, "_read_repeated", lambda *arguments: pytest.fail("read"))
    export_bundle(write_checkpoint(tmp_path / "c"), tmp_path / "b", max_tokens=MAX_TOKENS)
    assert np.isfinite(open_session(tmp_path / "b").feed([1])).all()
