"""libfwl's sessions give the results and errors of Python's sessions."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import resource
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fwl_export import open_session
from fwl_export.bundle.state_file import COMPRESSIONS
from fwl_export.engines import query_driver
from tests.bundles import MAX_TOKENS, VOCABULARY, as_hub_cache
from tests.libfwl.library import ALL, LAST, NONE, FwlError, Info, Library, Model, Options
from tests.tolerances import assert_close


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape)


def refused(kind: str, message: str, call: Callable[[], object]) -> None:
    with pytest.raises(FwlError, match=re.escape(message)) as caught:
        call()
    assert caught.value.kind == kind


def test_model_info(model: Model, tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    info = model.info
    assert info.model_id.decode() == manifest["model_id"]
    assert (info.vocab_size, info.max_tokens, info.precision) == (VOCABULARY, MAX_TOKENS, b"fp32")
    session = open_session(tiny_bundle)
    assert info.state_bytes == sum(spec.bytes_per_row for spec in session.specs)
    assert model.library.c.fwl_abi_version() == 1
    assert model.library.c.fwl_version() == b"0.2.0"


@pytest.mark.parametrize("which", [NONE, LAST, ALL])
def test_feeds_of_any_size_match_python(anchored: Model, anchored_bundle: Path, which: int) -> None:
    ours = anchored.session(3)
    python = open_session(anchored_bundle, batch=3, plugin="none", threads=1)
    rng = np.random.default_rng(5)
    for call in range(25):
        size = int(rng.choice([1, 1, 2, 7, MAX_TOKENS, 45]))
        lengths = rng.integers(0, size + 1, 3) if call % 3 else None
        weights = rng.random((3, size)) if call % 4 == 1 else None
        tokens = ids(3, size, seed=call)
        if call % 5 == 2:
            python.learning_rate_scale = scale = rng.random(3)
            ours.set_learning_rate_scale(scale)
        expected = python.feed(tokens, weights, lengths, last_only=which == LAST)
        found = ours.feed(tokens, weights, lengths, which)
        if which != NONE:
            assert_close("runtime.float32", found, expected)
        assert ours.positions == python.positions
    state = python.state
    for row in range(3):
        whole = b"".join(array[row].tobytes() for array in state.values())
        size = len(whole) - 8
        assert_close(
            "runtime.float32",
            ours.read_row(row)[8:].view(np.float32),
            np.frombuffer(whole[8:], np.float32, size // 4),
        )
    ours.close()


def test_half_precision(
    library: Library, runtime: Path, tiny_bundle_fp16: Path, tmp_path: Path
) -> None:
    model = library.open(tiny_bundle_fp16, runtime)
    session, python = model.session(2), open_session(tiny_bundle_fp16, batch=2, plugin="none")
    tokens = ids(2, 40)
    assert_close("runtime.float16", session.feed(tokens), python.feed(tokens))
    session.save_state(tmp_path / "a")
    python.load_state(tmp_path / "a")
    tokens = ids(2, 9, seed=1)
    assert_close("runtime.float16", session.feed(tokens), python.feed(tokens))
    model.close()
    session.feed(tokens)  # a session keeps its model
    session.close()


def test_the_plugin(
    library: Library,
    runtime: Path,
    tiny_bundle: Path,
    ort_library: Path,  # the fixture of tests/plugins
) -> None:
    session = library.open(tiny_bundle, runtime, ort_library).session(2)
    python = open_session(tiny_bundle, batch=2, plugin=ort_library)
    for seed, size in enumerate((1, 30, 1, 1)):
        tokens = ids(2, size, seed=seed)
        assert_close("runtime.float32", session.feed(tokens), python.feed(tokens))


def test_rows_are_forked_reset_and_moved(anchored: Model) -> None:
    session = anchored.session(3)
    session.feed(ids(3, 13))
    session.fork(1, [0])
    kept = session.read_row(2)
    session.reset([2])
    assert session.positions == [13, 13, 0]
    text = np.tile(ids(9, seed=2), (3, 1))
    logits = session.feed(text)
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])
    session.write_row(0, kept)
    assert session.positions == [13, 22, 9]
    session.reset()
    assert session.positions == [0, 0, 0]
    assert not session.read_row(1).any()


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_state_files_go_both_ways(
    anchored: Model, anchored_bundle: Path, tmp_path: Path, compress: str
) -> None:
    path = tmp_path / "a.state"
    python = open_session(anchored_bundle, batch=2, plugin="none", threads=1)
    python.feed(ids(2, 21), lengths=[21, 9])
    python.save_state(path, compress=compress)
    session = anchored.session(3)
    session.load_state(path, [2, 0])
    assert session.positions == [9, 0, 21]
    if compress != "none":
        python.load_state(path)
    text = ids(30, seed=3)
    expected = python.feed(np.stack([text, text]))
    found = session.feed(np.stack([text] * 3))
    assert_close("runtime.float32", found[[2, 0]], expected)
    session.save_state(path, [1, 2])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]
    python.load_state(path)
    assert python.positions == [30, 51]
    more = ids(5, seed=4)
    expected = session.feed(np.stack([more] * 3))[1:]
    assert_close("runtime.float32", python.feed(np.stack([more, more])), expected)


def test_wrong_arguments_move_no_row(model: Model) -> None:
    session = model.session(2)
    session.feed(ids(2, 5))
    before = [session.read_row(row) for row in range(2)]
    wrong: list[tuple[str, str, dict[str, Any]]] = [
        ("token", "token id 64 (row 1, position 1) is out of range; expected 0 to 63",
         {"tokens": [[1, 2], [3, 64]]}),
        ("token", "token id -1 (row 0, position 0)", {"tokens": [[-1], [1]]}),
        ("token", "label_weights contains nan; expected finite numbers of 0 or more",
         {"tokens": [[1], [1]], "label_weights": [[1], [np.nan]]}),
        ("token", "label_weights contains -1; expected finite numbers",
         {"tokens": [[1], [1]], "label_weights": [[-1], [1]]}),
        ("token", "the length of row 1 is 3; expected 0 to 2",
         {"tokens": ids(2, 2), "lengths": [1, 3]}),
        ("argument", "there are no tokens", {"tokens": np.zeros((2, 0))}),
        ("argument", "argument 'which' is 3; expected 0, 1 or 2",
         {"tokens": ids(2, 2), "which": 3}),
        ("argument", "logits has room for 127 floats; expected 128",
         {"tokens": ids(2, 2), "which": LAST, "room": 127}),
    ]  # fmt: skip
    for kind, message, arguments in wrong:
        refused(kind, message, lambda arguments=arguments: session.feed(**arguments))
    refused("argument", "row 2 does not exist; expected 0 to 1", lambda: session.reset([2]))
    refused("argument", "a row is named twice", lambda: session.reset([1, 1]))
    no_rows = "count is 0, but rows is not NULL; pass NULL and 0 for all rows"
    refused("argument", no_rows, lambda: session.reset([]))
    refused("argument", no_rows, lambda: session.save_state(Path("never.state"), []))
    refused("argument", "there are no targets", lambda: session.fork(0, []))
    refused(
        "argument", "the state has 3 bytes", lambda: session.write_row(0, np.zeros(3, np.uint8))
    )
    poisoned = before[0].copy()
    poisoned[8:12] = 255
    refused("state", "holds NaN or infinite values", lambda: session.write_row(0, poisoned))
    for scale in ([1.0, np.nan], [-1.0, 1.0]):
        refused(
            "argument",
            "learning_rate_scale must be 2 finite numbers of 0 or more",
            lambda scale=scale: session.set_learning_rate_scale(scale),
        )
    for row in range(2):
        np.testing.assert_array_equal(session.read_row(row), before[row])
    refused("argument", "rows is 0; expected 1 to 1048576", lambda: model.session(0))
    refused(
        "argument",
        "session is NULL",
        lambda: model.library.call("fwl_session_reset", None, None, 0),
    )


def test_an_output_that_is_not_finite_moves_no_row(
    library: Library, runtime: Path, anchored_bundle: Path
) -> None:
    anchored = library.open(anchored_bundle, runtime, max_learning_weight=np.inf)
    session = anchored.session(1)
    session.feed(ids(1, 5))
    before = session.read_row(0)
    tokens, weights = ids(1, 60), np.ones((1, 60))
    weights[0, 30] = 3e38  # learns too much: a later call of the split read breaks
    refused("token", "the model's output is not finite", lambda: session.feed(tokens, weights))
    np.testing.assert_array_equal(session.read_row(0), before)
    assert session.positions == [5]
    again = anchored.session(1)
    again.feed(ids(1, 5))
    for size in (1, 1, 30):
        np.testing.assert_array_equal(session.feed(tokens[:, :size]), again.feed(tokens[:, :size]))


def test_paths_of_folders_pipes_and_links(model: Model, tmp_path: Path) -> None:
    session = model.session(1)
    path, pipe, link = tmp_path / "a.state", tmp_path / "pipe", tmp_path / "link"
    session.save_state(path)
    os.mkfifo(pipe)
    refused("io", "it is a folder", lambda: session.load_state(tmp_path))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    specials = [pipe, Path("/dev/zero"), Path("/dev/null"), Path("/dev/tty"), tmp_path / "socket"]
    for special in specials:
        refused(
            "io", "it is not a regular file", lambda special=special: session.load_state(special)
        )
    for special in (tmp_path, *specials):
        refused(
            "io", "it is not a regular file", lambda special=special: session.save_state(special)
        )
    listener.close()
    assert pipe.is_fifo()
    link.symlink_to(path)
    before = path.read_bytes()
    session.feed([[1]])
    session.save_state(link)
    assert link.is_symlink()
    assert path.read_bytes() != before
    # A link to a file that does not exist yet stays a link too, as in Python.
    session.save_state(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "second").symlink_to("folder/new.state")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    session.save_state(tmp_path / "first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "folder" / "new.state").read_bytes() == path.read_bytes()
    (tmp_path / "loop").symlink_to("loop")
    refused(
        "io", "is a link that cannot be followed", lambda: session.save_state(tmp_path / "loop")
    )


def test_damaged_state_files(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    session, pair = model.session(1), model.session(2)
    session.feed(ids(1, 3))
    before = session.read_row(0)
    session.save_state(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for size in reversed(range(len(content))):
        os.truncate(path, size)
        refused("state", "was truncated or changed", lambda: session.load_state(path))
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(3000):  # must not crash
        changed = bytearray(content)
        for place in rng.integers(0, header, 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            session.load_state(path)
        except FwlError as error:
            kinds.add(error.kind)
        else:
            session.write_row(0, before)
    assert kinds <= {"state", "argument"}
    np.testing.assert_array_equal(session.read_row(0), before)
    path.write_bytes(content)
    tensors = load_file(path)
    for change, message in (
        ({"format": "other"}, "is a safetensors file, but not a state file; expected a file"),
        (
            {"version": "3"},
            "is a state file of version '3', but this libfwl reads versions 1 and 2",
        ),
        ({"version": "2"}, "has a sha256"),
        ({"version": "2", "sha256": "0" * 64}, "its sha256 is not that of its content"),
        ({"sha256": "0" * 64}, "has a sha256, and one of version 1 has none"),
        ({"model_id": "x"}, "was saved from another model"),
        ({"compress": "zip"}, "it has no known kind of compression"),
        ({"tokens": "4"}, "its metadata name other positions than its tensors"),
        ({"rows": "many"}, "'rows' is not a number"),
        ({"rows": "2"}, "but the model says"),
        ({"rows": "0"}, "it holds 0 rows"),
        ({"rows": "99999999999999999999"}, "'rows' is not a number"),
    ):
        metadata = {"format": "fwl-state", "version": "1", "rows": "1", "tokens": "3"}
        metadata |= {"compress": "none", "model_id": model.info.model_id.decode(), **change}
        save_file(tensors, path, metadata)
        refused("state", message, lambda: session.load_state(path))
    path.write_bytes(content)
    refused("argument", "holds 1 rows, but the call names 2", lambda: pair.load_state(path))
    refused("io", "cannot read", lambda: session.load_state(tmp_path / "b"))
    refused("io", "cannot write", lambda: session.save_state(tmp_path / "no" / "b"))
    path.write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # like a full disk
    try:
        refused("io", "File too large", lambda: session.save_state(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]


def test_bundles_that_cannot_be_used(
    library: Library, runtime: Path, own_bundle: Path, tmp_path: Path
) -> None:
    def opened() -> Model:
        return library.open(own_bundle, runtime)

    refused(
        "bundle",
        "is not a bundle: it has no manifest.json",
        lambda: library.open(tmp_path, runtime),
    )
    refused("runtime", "give the path of libonnxruntime.so", lambda: library.open(own_bundle, "/x"))
    refused("runtime", "is not ONNX Runtime", lambda: library.open(own_bundle, "libc.so.6"))
    refused("runtime", "ONNX Runtime: ", lambda: library.open(own_bundle, runtime, Path("/x")))
    manifest = own_bundle / "manifest.json"
    text = manifest.read_text()
    data = json.loads(text)
    entry = data["files"]["model.onnx"]
    for change, message in (
        ({"schema_version": 4}, "schema_version is 4, but this libfwl reads 3"),
        ({"state": []}, "is malformed"),
        ({"max_tokens": "x"}, "is malformed"),
        ({"files": {}}, "has no 'model.onnx' in its manifest"),
        (
            {"files": {"model.onnx": entry, "model.onnx../../x": entry}},
            "which leaves the bundle's folder",
        ),
    ):
        manifest.write_text(json.dumps({**data, **change}))
        refused("bundle", message, opened)
    manifest.write_text(text[:-20])
    refused("bundle", "is malformed", opened)
    manifest.write_text(text)
    weights = own_bundle / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    refused("bundle", "is not what the manifest says", opened)
    weights.unlink()
    refused("bundle", "lacks the file 'model.onnx.data'", opened)
    (tmp_path / "elsewhere").write_bytes(content)
    weights.symlink_to(tmp_path / "elsewhere")
    refused("bundle", "which leaves the bundle's folder", opened)
    weights.unlink()
    weights.write_bytes(content)
    opened().close()
    path = own_bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:-9])
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    manifest.write_text(json.dumps({**data, "files": {**data["files"], "model.onnx": entry}}))
    refused("bundle", "is not an ONNX model that libfwl reads (it ends inside a field)", opened)


def test_programs_built_with_an_older_header(library: Library, model: Model) -> None:
    options = Options()
    ctypes.memset(ctypes.byref(options), 0xFF, ctypes.sizeof(options))
    size = Options.device.offset  # where the first version ended
    library.c.fwl_options_init(ctypes.byref(options), ctypes.c_size_t(size))
    assert (options.size, options.backend, options.threads) == (size, b"onnxruntime", 0)
    assert bytes(options)[size:] == b"\xff" * (ctypes.sizeof(options) - size)
    info = Info(size=ctypes.sizeof(Info))
    library.call("fwl_model_info", model.handle, ctypes.byref(info))
    assert info.model_id == model.info.model_id


def test_a_library_of_another_interface_is_refused(library: Library, own_bundle: Path) -> None:
    """The real TensorRT-RTX, whose virtual tables are not those of TensorRT 10."""
    libs = pytest.importorskip("tensorrt_rtx_libs")
    (path,) = Path(next(iter(libs.__path__))).glob("libtensorrt_rtx.so.*")
    refused(
        "runtime",
        "but this libfwl was built for TensorRT 10",
        lambda: library.open(
            own_bundle, None, backend=b"tensorrt", tensorrt_library=str(path).encode()
        ),
    )


def test_a_machine_without_a_gpu(library: Library, own_bundle: Path) -> None:
    if query_driver().devices:
        pytest.skip("this machine has a GPU")
    refused(
        "runtime",
        "there is no CUDA device (",
        lambda: library.open(own_bundle, None, backend=b"tensorrt"),
    )


def test_threads(model: Model) -> None:
    texts = [ids(1, 48, seed=seed) for seed in range(6)]
    alone = []
    for text in texts:
        session = model.session()
        alone.append(session.feed(text))
        session.close()
    shared = model.session()

    def read(text: np.ndarray) -> np.ndarray:
        session = model.session()
        logits = [session.feed(part) for part in np.split(text, 12, 1)]
        shared.feed(text)
        session.close()
        return np.concatenate(logits, 1)

    with ThreadPoolExecutor(6) as pool:
        for expected, found in zip(alone, pool.map(read, texts), strict=True):
            assert_close("runtime.float32", found, expected)
    assert shared.positions == [6 * 48]


def test_the_layout_of_the_hugging_face_cache(
    library: Library, runtime: Path, tiny_bundle: Path, model: Model, tmp_path: Path
) -> None:
    cached = as_hub_cache(tiny_bundle, tmp_path / "models--a--b")
    expected = model.session(1).feed(ids(1, 3))
    (tmp_path / "link").symlink_to(cached)
    for folder in (cached, tmp_path / "link"):
        opened = library.open(folder, runtime)
        np.testing.assert_array_equal(opened.session(1).feed(ids(1, 3)), expected)
        opened.close()
    for name in ("model.onnx.data", "tokenizer.json", "manifest.json"):
        link, place = cached / name, tmp_path / "elsewhere"
        target = link.readlink()
        place.write_bytes(link.read_bytes())
        within = tmp_path / "models--a--b" / "blobs" / "within"
        within.symlink_to(place)
        (within.parent / "folder").mkdir()
        (within.parent / "folder" / "content").write_bytes(link.read_bytes())
        loop = within.with_name("loop")
        loop.symlink_to(loop)
        for leaving in (place, within, within.parent / "folder" / "content", loop, "/etc/hostname"):
            link.unlink()
            link.symlink_to(leaving)
            refused("bundle", "leaves the bundle's folder", lambda: library.open(cached, runtime))
        link.unlink()
        link.symlink_to(target)
        loop.unlink()
        within.unlink()
        (within.parent / "folder" / "content").unlink()
        (within.parent / "folder").rmdir()
    content = (cached / "model.onnx.data").resolve()
    content.write_bytes(bytes(content.stat().st_size))
    refused("bundle", "is not what the manifest says", lambda: library.open(cached, runtime))
    content.unlink()
    os.mkfifo(content)
    refused("bundle", "it is not a regular file", lambda: library.open(cached, runtime))
    blobs = content.parent
    blobs.rename(blobs.with_name("real"))
    blobs.symlink_to("real")
    refused("bundle", "copy the bundle with `cp -rL`", lambda: library.open(cached, runtime))


def test_a_bundle_whose_only_file_is_inlined(
    library: Library, runtime: Path, own_bundle: Path, model: Model
) -> None:
    path = own_bundle / "model.onnx"
    (own_bundle / "model.inlined.onnx").replace(path)
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = manifest["files"].pop("model.inlined.onnx")
    manifest["op"]["nodes"] = 0
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    opened = library.open(own_bundle, runtime)
    ours, theirs = opened.session(1), model.session(1)
    for size in (3, 1, MAX_TOKENS + 5):
        call = ids(1, size, seed=size)
        np.testing.assert_array_equal(ours.feed(call), theirs.feed(call))
    opened.close()
