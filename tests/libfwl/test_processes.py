"""Several processes share a bundle or a state file and never see a mixture of old and new."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fwl_export import open_session
from fwl_export.bundle.manifest import describe_file
from fwl_export.runtimes.text import score_ids
from tests.bundles import VOCABULARY
from tests.libfwl.library import Model
from tests.libfwl.test_examples import run
from tests.tolerances import assert_close

REPOSITORY = Path(__file__).parents[2]
PROMPT = [5, 9, 63, 1]

_REPORT = """
    import json, sys
    import numpy as np
    from fwl_export import errors, open_session
    from pathlib import Path
    from tests.libfwl.library import FwlError, Library

    bundle, library, runtime = sys.argv[1:4]
    c = Library(Path(library)) if library else None

    def read():
        if c is None:
            session = open_session(bundle, plugin="none", threads=1)
            return session.model_id, session.feed([{prompt}])
        model = c.open(Path(bundle), Path(runtime))
        session = model.session()
        try:
            return model.info.model_id.decode(), session.feed([{prompt}])
        finally:
            session.close()
            model.close()

    print("ready", flush=True)
    for _ in range(40):
        try:
            model_id, logits = read()
            print(json.dumps([model_id, logits.ravel().tolist()]), flush=True)
        except (FwlError, errors.FwlError) as error:
            print(json.dumps([str(error)]), flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def other_weights(bundle: Path, target: Path) -> Path:
    """Copy a bundle and change its weights, but not its graph."""
    shutil.copytree(bundle, target)
    weights = target / "model.onnx.data"
    (np.fromfile(weights, np.float32) * np.float32(0.5)).tofile(weights)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"][weights.name] = describe_file(weights)
    manifest["model_id"] = "f" * 64
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_processes_load_a_bundle_while_another_replaces_it(
    own_bundle: Path, tmp_path: Path, libfwl: Path, runtime: Path
) -> None:
    other = other_weights(own_bundle, tmp_path / "other")
    expected = {}
    for bundle in (own_bundle, other):
        session = open_session(bundle, plugin="none", threads=1)
        expected[session.model_id] = session.feed([PROMPT]).ravel()
    assert not np.allclose(*expected.values())
    code = _REPORT.format(prompt=PROMPT)
    processes = [
        start(code, own_bundle, "", ""),
        start(code, own_bundle, libfwl / "libfwl.so", runtime),
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    rng, old = np.random.default_rng(0), tmp_path / "old"
    # The swaps end before the loads do, so that some loads succeed even on a slow machine.
    for _ in range(40):
        own_bundle.rename(old)
        other.rename(own_bundle)
        old.rename(other)
        time.sleep(0.1 * rng.random())
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        lines = [json.loads(line) for line in output.splitlines()]
        assert len(lines) == 40
        counts = Counter(line[0] for line in lines)
        for line in lines:
            if len(line) == 1:  # the message of a load that was refused
                assert str(own_bundle) in line[0]
                assert "\n" not in line[0]
                assert line[0].endswith(("again", "writes one", "not use this bundle"))
            else:
                assert_close("runtime.float32", np.array(line[1]), expected[line[0]])
        assert counts.keys() & expected.keys(), counts


def test_a_process_killed_while_libfwl_saves_leaves_the_old_file_or_the_new_one(
    tiny_bundle: Path, tmp_path: Path, libfwl: Path, runtime: Path, model: Model
) -> None:
    path = tmp_path / "a.state"
    code = """
        import sys
        from pathlib import Path
        from tests.libfwl.library import Library

        library, runtime, bundle, path = map(Path, sys.argv[1:])
        model = Library(library).open(bundle, runtime)
        sessions = [model.session() for _ in range(3)]
        for count, session in enumerate(sessions, 1):
            session.feed([[7] * count])
        print("ready", flush=True)
        while True:
            for session in sessions:
                session.save_state(path)
    """
    expected = {}
    for count in range(1, 4):
        session = model.session()
        session.feed([[7] * count])
        expected[count] = session.read_row(0)
    found = model.session()
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = start(code, libfwl / "libfwl.so", runtime, tiny_bundle, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.02 + 0.05 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found.load_state(path)
        np.testing.assert_array_equal(found.read_row(0), expected[found.positions[0]])
    # The next save removes what killed processes left, and nothing that only looks like it.
    lock, signature = "lock", "written by libfwl\n"
    for name, content in (
        (".fwl-killed", {lock: signature, "file": "half a state"}),
        (".fwl-notour", {lock: "", "file": "mine"}),
        (".fwl-letter", {"file": "mine"}),
        (".fwl-living", {lock: signature, "file": "still being written"}),
        (f"{path.name}.{process.pid}.1.tmp", {"file": "mine"}),
    ):
        (tmp_path / name).mkdir()
        for part, text in content.items():
            (tmp_path / name / part).write_text(text)
    with (tmp_path / ".fwl-living" / lock).open() as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        found.save_state(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        path.name,
        ".fwl-notour",
        ".fwl-letter",
        ".fwl-living",
        f"{path.name}.{process.pid}.1.tmp",
    }


def test_libfwl_saves_despite_files_of_a_process_with_the_same_id(
    tmp_path: Path, model: Model
) -> None:
    session = model.session()
    session.feed([PROMPT])
    session.save_state(tmp_path / "other.state")
    for number in range(
        1, 1000
    ):  # like a container that restarts: its process has the same id each time
        (tmp_path / f"a.state.{os.getpid()}.{number}.tmp").touch()
    session.save_state(tmp_path / "a.state")
    assert (tmp_path / "a.state").read_bytes() == (tmp_path / "other.state").read_bytes()


def test_a_document_read_in_one_process_is_continued_in_two_others(
    anchored_bundle: Path, tmp_path: Path, libfwl: Path, runtime: Path
) -> None:
    rng = np.random.default_rng(0)
    document, question = rng.integers(0, VOCABULARY, 150), rng.integers(0, VOCABULARY, 90)
    (tmp_path / "document").write_text(json.dumps(document.tolist()))
    (tmp_path / "question").write_text(" ".join(map(str, question)))
    state = tmp_path / "document.state"
    reader = """
        import json, sys
        from pathlib import Path
        from fwl_export import open_session

        session = open_session(sys.argv[1], "torch")
        session.feed(json.loads(Path(sys.argv[2]).read_text()), last_only=True)
        session.save_state(Path(sys.argv[3]))
    """
    answer = """
        import sys
        from pathlib import Path
        from fwl_export import open_session

        session = open_session(sys.argv[1], plugin="none")
        session.load_state(Path(sys.argv[2]))
        print(*session.generate([5, 9], 20))
    """
    process = start(reader, anchored_bundle, tmp_path / "document", state)
    process.communicate()
    assert process.returncode == 0
    whole = open_session(anchored_bundle, plugin="none")
    whole.feed(document)
    read = whole.state
    expected = list(whole.generate([5, 9], 20))
    whole.state = read
    perplexity = score_ids(whole, question).perplexity

    python = start(answer, anchored_bundle, state)
    assert python.communicate()[0].split() == [str(token) for token in expected]
    shutil.copy(state, tmp_path / "copy.state")  # because `score` overwrites its state file
    cpp = run(
        runtime, libfwl / "score", anchored_bundle, tmp_path / "question", tmp_path / "copy.state"
    )
    assert cpp.returncode == 0, cpp.stderr
    assert float(cpp.stdout) == pytest.approx(perplexity, rel=1e-5)
