"""The hashes of the constraints: what the index answers, and wheels from elsewhere."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tools import lock
from tools.install import Pin, read_lock

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def test_new_pins_get_hashes_and_others_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(pins: Iterable[Pin]) -> dict[str, Pin]:
        asked.extend(f"{pin.name}=={pin.version}" for pin in pins)
        return {"new-name": Pin("new-name", "1", (A,)), "torch": Pin("torch", "2.13.0", (A, B))}

    monkeypatch.setattr(lock, "ask_index", answer)
    wheel = tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"a build from elsewhere")
    users = {"always": {"new-name"}, "cpu": {"new-name"}}
    text = lock.lock(f"# why\ntorch==2.13.0 --hash=sha256:{C}\nNew_Name==1\n", [wheel], users)
    assert asked == ["torch==2.13.0", "new-name==1"]
    assert text.startswith("# why\nnew-name==1 \\\n    --hash=sha256:")
    pins = read_lock(text)
    assert pins["new-name"] == Pin("new-name", "1", (A,), frozenset({"always", "cpu"}))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert pins["torch"].hashes == tuple(sorted((A, B, C, digest)))


def test_a_pin_without_any_hash_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ask_index", lambda pins: {})
    with pytest.raises(lock.LockError, match="lists no hashes of name==1"):
        lock.lock("name==1\n")


def test_without_uv_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(lock.LockError, match="uv is not installed"):
        lock.ask_index([])


def test_what_an_extra_needs_is_pinned_for_it() -> None:
    """The lists in constraints.txt are those of this environment, for each extra."""
    pins = read_lock((lock.REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
    for extra in ("always", *lock.EXTRAS):
        listed = {name for name, pin in pins.items() if extra in pin.extras}
        assert lock.needed(extra) == listed, extra
    assert "numpy" in lock.needed("always")
    assert "torch" in lock.needed("hf") - lock.needed("always")
