"""Manifests: what they say is checked, and no path leads out of the bundle's folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from fwl_export import files
from fwl_export.bundle import manifest as manifests
from fwl_export.bundle.manifest import Manifest, describe_file, read_bundle
from fwl_export.bundle.onnx_file import external_data_locations
from fwl_export.errors import BundleError, FwlError
from fwl_export.files import replaced_folder

REPOSITORY = Path(__file__).parents[2]


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refused(bundle: Path, message: str, kind: type[FwlError] = BundleError) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        read_bundle(bundle).verify()


def test_a_written_bundle_verifies(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    bundle.verify()
    assert Manifest.from_dict(bundle.manifest.to_dict(), "") == bundle.manifest
    on_disk = {p.relative_to(tiny_bundle).as_posix() for p in tiny_bundle.rglob("*") if p.is_file()}
    assert on_disk - {"manifest.json"} == set(bundle.manifest.files)


def test_a_bundle_shows_what_it_holds(tiny_bundle: Path) -> None:
    assert repr(read_bundle(tiny_bundle)) == (
        f"<Bundle '{tiny_bundle}': precision fp32, backbone decoder of width 16, vocabulary 64 "
        "tokens, fast weights 16 -> 32 -> 16, anchor none, state 10.6 kB per row>"
    )
    page = read_bundle(tiny_bundle)._repr_html_()
    assert "<tr><th>Vocabulary</th><td>64 tokens</td></tr>" in page
    assert "<tr><th>Fast weights</th><td>16 -&gt; 32 -&gt; 16</td></tr>" in page
    assert "<tr><th>model.onnx</th><td>" in page


def test_what_a_manifest_says_is_escaped_in_a_notebook(own_bundle: Path) -> None:
    attack = "<img src=x onerror='alert(1)'>"
    entry = {"sha256": "0", "bytes": 1}
    edit(
        own_bundle,
        lambda data: data.update(precision=attack, model_id=attack, files={attack: entry}),
    )
    page = read_bundle(own_bundle)._repr_html_()
    assert page.count("&lt;img src=x onerror=&#x27;alert(1)&#x27;&gt;") == 3
    assert "<img" not in page


def test_a_folder_that_is_not_a_bundle(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle: it has no manifest.json; `fwl-export export` writes one")


def test_a_newer_schema(own_bundle: Path) -> None:
    edit(own_bundle, lambda data: data.update(schema_version=4))
    refused(own_bundle, "schema_version is 4, but this fwl-export reads 3; update fwl-export")


def test_an_older_schema(own_bundle: Path) -> None:
    edit(own_bundle, lambda data: data.update(schema_version=0))
    refused(own_bundle, "export the model again")


@pytest.mark.parametrize("key", ["config", "state", "files", "max_tokens", "model_id"])
def test_a_missing_part(own_bundle: Path, key: str) -> None:
    edit(own_bundle, lambda data: data.pop(key))
    refused(
        own_bundle, f"manifest.json is malformed: key '{key}' is missing; export the model again"
    )


def test_a_part_of_the_wrong_kind(own_bundle: Path) -> None:
    edit(own_bundle, lambda data: data.update(state=7))
    refused(own_bundle, "manifest.json is malformed")


def test_a_truncated_manifest(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    path.write_text(path.read_text()[:-9])
    refused(own_bundle, "is not JSON")


def test_a_changed_file(own_bundle: Path) -> None:
    path = own_bundle / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    refused(own_bundle, "'model.onnx.data' in bundle")
    with pytest.raises(BundleError, match="it was changed or truncated"):
        read_bundle(own_bundle).model_files()


def test_a_truncated_file(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1])
    refused(own_bundle, "it was changed or truncated: copy the bundle again, or export")


def test_a_missing_file(own_bundle: Path) -> None:
    (own_bundle / "tokenizer.json").unlink()
    refused(own_bundle, "lacks the file 'tokenizer.json'")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a\\..\\x"])
def test_a_path_that_leaves_the_folder(own_bundle: Path, name: str) -> None:
    entry = {"sha256": "0", "bytes": 0}
    edit(own_bundle, lambda data: data["files"].update({name: entry}))
    refused(own_bundle, "which leaves the bundle's folder; do not use this bundle")


def test_a_link_that_leaves_the_folder(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "tokenizer.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    refused(own_bundle, "which leaves the bundle's folder")


def test_external_data_that_leaves_the_folder(own_bundle: Path) -> None:
    from fwl_export.bundle.manifest import describe_file

    path = own_bundle / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    assert external_data_locations(path) == {"model.onnx.data"}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    path.write_bytes(model.SerializeToString())
    edit(own_bundle, lambda data: data["files"].update({"model.onnx": describe_file(path)}))
    with pytest.raises(BundleError, match=r"names the path '\.\./secret', which leaves"):
        read_bundle(own_bundle).model_files()


def test_added_files_are_recorded(own_bundle: Path) -> None:
    bundle = read_bundle(own_bundle)
    (own_bundle / "engines").mkdir()
    (own_bundle / "engines" / "a.engine").write_bytes(b"abc")
    (own_bundle / "engines" / "b.engine").write_bytes(b"abc")
    bundle.add_files(["engines/a.engine"])
    after = bundle.add_files(["engines/b.engine"])
    assert {"engines/a.engine", "engines/b.engine"} <= set(after.manifest.files)
    after.verify()


ADD = """
import sys
from pathlib import Path
from fwl_export.bundle.manifest import read_bundle
folder, number = Path(sys.argv[1]), sys.argv[2]
bundle = read_bundle(folder)
print("ready", flush=True)
sys.stdin.readline()
for entry in range(20):
    name = f"engines/{number}-{entry}"
    (folder / name).write_text(name)
    bundle.add_files([name])
"""


def test_no_process_loses_what_another_adds(own_bundle: Path) -> None:
    (own_bundle / "engines").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(own_bundle), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[1] == ""
    bundle = read_bundle(own_bundle)
    added = [name for name in bundle.manifest.files if name.startswith("engines/")]
    assert len(added) == 80
    bundle.verify()
    assert sorted(path.name for path in own_bundle.glob(".*")) == []


def test_files_are_taken_out_of_the_manifest(own_bundle: Path) -> None:
    bundle = read_bundle(own_bundle)
    after = bundle.remove_files(["tokenizer.json", "engines/none"])
    assert set(bundle.manifest.files) - set(after.manifest.files) == {"tokenizer.json"}
    manifest = own_bundle / "manifest.json"
    before = manifest.stat()
    bundle.remove_files(["tokenizer.json"])
    assert manifest.stat() == before
    assert "tokenizer.json" in bundle.add_files(["tokenizer.json"]).manifest.files


def test_nothing_is_added_to_a_bundle_of_another_model(
    own_bundle: Path, tiny_bundle_fp16: Path
) -> None:
    bundle, words = read_bundle(own_bundle), "was replaced by another export meanwhile, so nothing"
    (own_bundle / "more").write_text("x")
    with replaced_folder(own_bundle) as beside:
        shutil.copytree(tiny_bundle_fp16, beside, dirs_exist_ok=True)
    (own_bundle / "more").write_text("x")
    before = (own_bundle / "manifest.json").read_bytes()
    for change in (bundle.add_files, bundle.remove_files):
        with pytest.raises(BundleError, match=words):
            change(["more"])
    assert (own_bundle / "manifest.json").read_bytes() == before
    # The same weights, exported with another opset.
    bundle = read_bundle(own_bundle)
    edit(own_bundle, lambda data: data.update(opset=21))
    with pytest.raises(BundleError, match=words):
        bundle.add_files(["more"])


def test_a_bundle_that_is_replaced_while_a_file_is_added_gets_nothing(
    own_bundle: Path, tiny_bundle_fp16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(own_bundle)
    (own_bundle / "more").write_text("x")

    def export(path: Path) -> dict[str, Any]:
        entry = describe_file(path)
        with replaced_folder(own_bundle) as beside:
            shutil.copytree(tiny_bundle_fp16, beside, dirs_exist_ok=True)
        return entry

    monkeypatch.setattr(manifests, "describe_file", export)
    with pytest.raises(BundleError, match="was replaced by another export meanwhile, so nothing"):
        bundle.add_files(["more"])
    names = sorted(path.name for path in own_bundle.iterdir())
    assert names == sorted(path.name for path in tiny_bundle_fp16.iterdir())
    assert "more" not in read_bundle(own_bundle).manifest.files


def test_read_file_returns_what_was_hashed(own_bundle: Path) -> None:
    bundle, path = read_bundle(own_bundle), own_bundle / "tokenizer.json"
    content = path.read_bytes()
    assert bundle.read_file("tokenizer.json") == content
    for other in (content[:-1], content + b" ", b"[" + content[1:], b""):
        path.write_bytes(other)
        with pytest.raises(BundleError, match="was changed or truncated: copy the bundle again"):
            bundle.read_file("tokenizer.json")
    with pytest.raises(BundleError, match="has no 'x' in its manifest"):
        bundle.read_file("x")
    path.unlink()
    with pytest.raises(BundleError, match=r"lacks the file 'tokenizer\.json'"):
        bundle.read_file("tokenizer.json")


def test_reading_completes_a_replacement_that_was_cut_off(own_bundle: Path) -> None:
    work = own_bundle.with_name(".bundle.fwl-export")
    work.mkdir()
    (work / "lock").write_text(files._MARK)
    own_bundle.rename(work / "old")
    read_bundle(own_bundle).verify()
    assert not work.exists()


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_refused(
    own_bundle: Path, tmp_path: Path
) -> None:
    bundle, aside, probe = read_bundle(own_bundle), tmp_path / "aside", tmp_path / "probe"
    while True:  # until the file system's clock has advanced
        probe.touch()
        if probe.stat().st_ctime_ns > own_bundle.stat().st_ctime_ns:
            break

    def loaded(*renames: tuple[Path, Path]) -> None:
        with bundle.unchanged():
            for source, target in renames:
                source.rename(target)
            bundle.model_files()

    loaded()
    there, back = (own_bundle, aside), (aside, own_bundle)
    replaced = "was replaced or changed while it was opened; open it again"
    with pytest.raises(BundleError, match=replaced):
        loaded(there, back)
    with pytest.raises(BundleError, match=replaced):
        loaded(there)
    with pytest.raises(BundleError, match=r"lacks the file 'model\.onnx'"):
        loaded()
    with pytest.raises(BundleError, match=replaced):
        loaded(back)


def test_updates_of_another_version_are_refused_where_they_would_differ(own_bundle: Path) -> None:
    def change(version: int, precision: str) -> Callable[[dict[str, Any]], object]:
        return lambda data: data.update(op={**data["op"], "version": version}, precision=precision)

    for precision in ("fp32", "int8w"):  # with float32 activations, version 1 is the same
        edit(own_bundle, change(1, precision))
        read_bundle(own_bundle)
    for precision in ("fp16", "mix16"):
        edit(own_bundle, change(1, precision))
        refused(
            own_bundle,
            f"the model has the precision '{precision}' with version 1 of "
            "fwl::LinearAttentionUpdate, whose sums overflow in half precision; export the model "
            "again",
        )
    for version in (0, 3):
        edit(own_bundle, change(version, "fp32"))
        refused(
            own_bundle,
            f"fwl::LinearAttentionUpdate has version {version}, but this version of fwl-export "
            "runs versions 1 to 2; update fwl-export, or export the model again",
        )
