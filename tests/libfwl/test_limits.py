"""How much a session of libfwl may learn, compared with Python's sessions."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.bundle.defaults import DEFAULT_MAX_LEARNING_WEIGHT
from fwl_export.errors import TokenError
from tests.bundles import VOCABULARY
from tests.libfwl.library import NONE, FwlError, Library, Model, Options, Session


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def refuses(session: Session, message: str, *arguments: object) -> None:
    before = [bytes(session.read_row(row)) for row in range(session.rows)]
    with pytest.raises(FwlError, match=re.escape(message)) as caught:
        session.feed(*arguments, which=NONE)
    assert caught.value.kind == "token"
    assert [bytes(session.read_row(row)) for row in range(session.rows)] == before


def test_the_default_is_that_of_python(anchored: Model, anchored_bundle: Path) -> None:
    session = anchored.session(2)
    weights = np.ones((2, 20), np.float32)
    weights[1, 17] = DEFAULT_MAX_LEARNING_WEIGHT
    session.feed(ids(2, 20), weights)
    weights[1, 17] = np.nextafter(np.float32(DEFAULT_MAX_LEARNING_WEIGHT), np.float32(11))
    with pytest.raises(TokenError) as python:
        open_session(anchored_bundle, batch=2).feed(ids(2, 20), weights)
    refuses(
        session,
        str(python.value).replace("open the session", "open the model"),
        ids(2, 20),
        weights,
    )
    with pytest.raises(FwlError, match="learning_rate_scale of row 1 is 11, but max_learning_we"):
        session.set_learning_rate_scale([1, 11])


def test_learned_is_that_of_python(anchored: Model, anchored_bundle: Path) -> None:
    session, python = anchored.session(3), open_session(anchored_bundle, batch=3)
    assert session.learned() == python.learned().norms == [0, 0, 0]
    for each in (session, python):
        each.feed(ids(3, 40), None, [40, 0, 9])
    # The states differ by roundings of float32, which grow over a few calls.
    np.testing.assert_allclose(session.learned(), python.learned().norms, rtol=1e-5)
    assert session.learned()[0] > 0


def test_limits_are_options(library: Library, runtime: Path, anchored_bundle: Path) -> None:
    model = library.open(
        anchored_bundle, runtime, max_learning_weight=math.inf, max_update_norm=50.0
    )
    session = model.session(2)
    session.feed(ids(2, 30), which=NONE)
    usual = session.learned()
    assert max(usual) < 50
    checkpoint = session.read_row(1)
    weights = np.ones((2, 30))
    weights[1, 25] = 1e4
    refuses(session, "what row 1 would have learned has the norm ", ids(2, 30), weights)
    session.feed(ids(2, 30), np.full((2, 30), 1.5), which=NONE)
    session.write_row(1, checkpoint)
    assert session.learned()[1] == usual[1]
    for name in ("max_learning_weight", "max_update_norm", "clip_update_norm"):
        for wrong in (-1.0, math.nan):
            with pytest.raises(FwlError, match=f"{name} is .*; expected 0 for the default"):
                library.open(anchored_bundle, runtime, **{name: wrong})


def test_what_a_row_has_learned_is_clipped_as_in_python(
    library: Library, runtime: Path, anchored_bundle: Path
) -> None:
    session = library.open(anchored_bundle, runtime, clip_update_norm=5.0).session(2)
    python = open_session(anchored_bundle, batch=2, plugin="none", clip_update_norm=5.0)
    text = ids(2, 70)
    session.feed(text, which=NONE, lengths=[70, 64])
    python.feed(text, lengths=[70, 64])
    assert session.learned()[0] > 5
    assert session.learned()[1] == pytest.approx(5, rel=1e-5)
    # Float32 sums of two runs of 70 tokens, which differ by roundings and feed back.
    np.testing.assert_allclose(session.learned(), python.learned().norms, rtol=1e-4)


def test_a_program_built_before_the_limits_gets_the_defaults(
    library: Library, runtime: Path, anchored_bundle: Path
) -> None:
    options = Options()
    ctypes.memset(ctypes.byref(options), 0xFF, ctypes.sizeof(options))
    size = Options.max_learning_weight.offset
    library.c.fwl_options_init(ctypes.byref(options), ctypes.c_size_t(size))
    options.runtime_library, options.threads = str(runtime).encode(), 1
    handle = ctypes.c_void_p()
    path = str(anchored_bundle).encode()
    library.call("fwl_model_open", path, ctypes.byref(options), ctypes.byref(handle))
    session = Model(library, handle).session()
    session.feed(ids(1, 3), np.full((1, 3), 10))
    refuses(session, "but max_learning_weight is 10;", ids(1, 3), np.full((1, 3), 11))
