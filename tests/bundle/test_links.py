"""Bundles whose files are links: the Hugging Face cache is read, and nothing else outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwl_export.bundle.manifest import describe_file, read_bundle
from fwl_export.bundle.paths import place_for
from fwl_export.errors import BundleError
from fwl_export.export import export_bundle
from fwl_export.files import replaced_file
from fwl_export.filesystem import hub_blobs
from fwl_export.runtimes import open_session
from tests.bundles import as_hub_cache, write_checkpoint
from tests.cli.run import run


@pytest.fixture
def cached(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle as a snapshot in the Hugging Face cache."""
    return as_hub_cache(tiny_bundle, tmp_path / "hub" / "models--a--b")


def contents(cached: Path) -> dict[str, str]:
    """Return the hash of each content in the cache, by its file's name."""
    blobs = hub_blobs(cached)
    assert blobs is not None
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in blobs.iterdir()}


def test_a_cached_bundle_computes_the_same(cached: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert all(p.is_symlink() for p in cached.rglob("*") if not p.is_dir())
    read_bundle(cached).verify()
    for runtime in ("onnxruntime", "torch", "onnx-reference"):
        logits = open_session(cached, runtime).feed([1, 2, 3])
        np.testing.assert_array_equal(logits, open_session(tiny_bundle, runtime).feed([1, 2, 3]))
    # Links to the snapshot's folder, as users make them.
    (tmp_path / "link").symlink_to(cached)
    (cached.parent / "main").symlink_to(cached.name)
    for folder in (tmp_path / "link", cached.parent / "main"):
        read_bundle(folder).verify()


def test_a_bundle_in_a_folder_of_the_snapshot(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "repository" / "bundles" / "fp32")
    cached = as_hub_cache(tmp_path / "repository", tmp_path / "models--a--b")
    read_bundle(cached / "bundles" / "fp32").verify()


def test_a_changed_content_is_found(cached: Path) -> None:
    path = (cached / "model.onnx.data").resolve()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(BundleError, match="it was changed or truncated"):
        open_session(cached)


def test_a_missing_content(cached: Path) -> None:
    (cached / "tokenizer.json").resolve().unlink()
    with pytest.raises(BundleError, match=r"lacks the file .*tokenizer\.json"):
        read_bundle(cached).verify()


def _elsewhere(cached: Path, target: Path) -> None:
    target.symlink_to(cached.parents[3] / "secret")


def _absolute(cached: Path, target: Path) -> None:
    target.symlink_to("/etc/hostname")


def _other_repository(cached: Path, target: Path) -> None:
    other = cached.parents[2] / "models--a--c" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(cached.parents[3] / "secret", other / "1")
    target.symlink_to(f"../../../{other.parent.name}/blobs/1")


def _through_blobs(cached: Path, target: Path) -> None:
    target.symlink_to("../../blobs/../refs/main")


def _below_blobs(cached: Path, target: Path) -> None:
    folder = cached.parents[1] / "blobs" / "folder"
    folder.mkdir()
    shutil.copyfile(cached.parents[3] / "secret", folder / "1")
    target.symlink_to("../../blobs/folder/1")


def _link_in_blobs(cached: Path, target: Path) -> None:
    (cached.parents[1] / "blobs" / "1").symlink_to(cached.parents[3] / "secret")
    target.symlink_to("../../blobs/1")


def _loop(cached: Path, target: Path) -> None:
    (cached.parents[1] / "blobs" / "1").symlink_to("2")
    (cached.parents[1] / "blobs" / "2").symlink_to("1")
    target.symlink_to("../../blobs/1")


LEAVING = [_elsewhere, _absolute, _other_repository, _through_blobs, _below_blobs, _link_in_blobs]


@pytest.mark.parametrize("link", [*LEAVING, _loop])
@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "checkpoint/config.json"])
def test_a_link_to_anything_but_a_content(
    link: Callable[[Path, Path], None], name: str, cached: Path
) -> None:
    target = cached / name
    secret = cached.parents[3] / "secret"
    shutil.copyfile(target, secret)  # what the manifest has the hash of
    (cached.parents[1] / "refs").mkdir()
    shutil.copyfile(target, cached.parents[1] / "refs" / "main")
    target.unlink()
    link(cached, target if target.parent == cached else _lifted(target))
    with pytest.raises(BundleError, match=r"leaves the bundle's folder|lacks the file|not a bun"):
        read_bundle(cached).verify()


def _lifted(target: Path) -> Path:
    """Make a file of a subfolder a link to one of the bundle's folder, and return that."""
    target.symlink_to("../lifted")
    return target.parents[1] / "lifted"


@pytest.mark.parametrize("kind", ["a folder", "a named pipe"])
def test_a_content_that_is_no_file(kind: str, cached: Path) -> None:
    path = (cached / "model.onnx").resolve()
    path.unlink()
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    with pytest.raises(BundleError, match=r"lacks the file 'model\.onnx'"):
        open_session(cached)


def test_blobs_that_are_a_link_are_no_cache(cached: Path) -> None:
    blobs = hub_blobs(cached)
    assert blobs is not None
    blobs.rename(blobs.with_name("real"))
    blobs.symlink_to("real")
    assert hub_blobs(cached) is None
    with pytest.raises(BundleError, match=r"through a link\. If the link is yours, copy"):
        read_bundle(cached)


def test_links_inside_a_bundle_are_followed(own_bundle: Path) -> None:
    (own_bundle / "tokenizer.json").rename(own_bundle / "other.json")
    (own_bundle / "tokenizer.json").symlink_to("other.json")
    (own_bundle / "checkpoint").rename(own_bundle / "weights")
    (own_bundle / "checkpoint").symlink_to("weights")
    read_bundle(own_bundle).verify()


def test_a_copy_of_the_links_alone_says_what_to_do(cached: Path, tmp_path: Path) -> None:
    shutil.copytree(cached, tmp_path / "x" / "y" / "copy", symlinks=True)
    with pytest.raises(BundleError, match="copy the bundle with `cp -rL`"):
        read_bundle(tmp_path / "x" / "y" / "copy")


def test_what_is_added_leaves_the_cache_as_it_was(cached: Path) -> None:
    before = contents(cached)
    path = place_for(cached, "engines/a.engine")
    with replaced_file(path, through_link=False) as beside:
        beside.write_bytes(b"abc")
    bundle = read_bundle(cached).add_files(["engines/a.engine"])
    bundle.verify()
    assert contents(cached) == before
    assert not (cached / "manifest.json").is_symlink()
    assert not path.is_symlink()
    # An engine that came with the cache is replaced as a link, not as a content.
    again = as_hub_cache(cached, cached.parents[2] / "models--a--again")
    held = contents(again)
    with replaced_file(place_for(again, "engines/a.engine"), through_link=False) as beside:
        read_bundle(again).remove_files(["engines/a.engine"])
        beside.write_bytes(b"def")
    read_bundle(again).add_files(["engines/a.engine"]).verify()
    assert contents(again) == held


def test_a_report_leaves_the_cache_as_it_was(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("ABCDEFGH" * 4)
    (cached / "reports").mkdir()
    for name in ("parity.json", "parity.html"):
        (cached / "reports" / name).symlink_to("../../../blobs/" + min(contents(cached)))
    before = contents(cached)
    options = ("--text", tmp_path / "text", "--tokens", 8, "--cases", "text")
    assert run(capsys, "check", cached, *options, "--candidates", "onnxruntime").code == 0
    assert contents(cached) == before
    assert json.loads((cached / "reports" / "parity.json").read_text())["passed"]


@pytest.mark.parametrize("name", ["engines", "reports"])
def test_nothing_is_written_into_a_folder_that_is_a_link(
    name: str, own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs").mkdir()
    (own_bundle / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(BundleError, match="leaves the bundle's folder through a link"):
        place_for(own_bundle, f"{name}/x")
    if name == "reports":
        (tmp_path / "text").write_text("ABCDEFGH" * 4)
        done = run(capsys, "check", own_bundle, "--text", tmp_path / "text", "--tokens", 8)
        assert done.code == 2
        assert "through a link" in done.err
    assert list((tmp_path / "theirs").iterdir()) == []


def test_an_export_over_a_cached_bundle(cached: Path) -> None:
    before = contents(cached)
    export_bundle(cached / "checkpoint", cached, max_tokens=16, force=True)
    read_bundle(cached).verify()
    assert contents(cached) == before


def test_an_export_of_a_cached_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    cached = as_hub_cache(checkpoint, tmp_path / "models--a--b")
    bundle = export_bundle(cached, tmp_path / "bundle", max_tokens=16)
    bundle.verify()
    found = [p for p in (tmp_path / "bundle").rglob("*") if p.is_symlink()]
    assert found == []


def test_a_state_file_that_is_a_link(cached: Path, tmp_path: Path) -> None:
    session = open_session(cached)
    session.feed([1, 2, 3])
    session.save_state(tmp_path / "real.state")
    (tmp_path / "link.state").symlink_to("real.state")
    other = open_session(cached)
    other.load_state(tmp_path / "link.state")
    np.testing.assert_array_equal(session.feed([4]), other.feed([4]))


def test_replacing_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    links: dict[str, Any] = {"link": "target", "dangling": "nothing", "loop": "loop", "up": ".."}
    for name, to in links.items():
        (tmp_path / name).symlink_to(to)
        with replaced_file(tmp_path / name, through_link=False) as beside:
            beside.write_text("new")
        assert (tmp_path / name).read_text() == "new"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_text() == "kept"
    assert describe_file(tmp_path / "link")["bytes"] == 3
