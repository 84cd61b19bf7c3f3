"""What the attacks share: a good bundle to spoil, limits on memory and time, and the verdict.

An attack is a function that takes a `Place`, spoils what lies there and opens it as a user would.
`run` calls it and prints the outcome:

    refused: BundleError: ...     an FwlError, which the command line prints as one sentence
    harmless: ...                 there was nothing to refuse, and the attack did nothing
    accepted                      the attack went through
    traceback: MemoryError: ...   another exception: a bug
    hang                          the attack was still running after `SECONDS`
    escaped: ...                  a file outside the bundle was written, changed or removed
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwl_export.bundle.manifest import MANIFEST_FILE, MODEL_FILE, describe_file, read_bundle
from fwl_export.errors import FwlError

if TYPE_CHECKING:
    import onnx

    from fwl_export.model.checkpoint import Checkpoint

# A refusal needs neither. The limit on memory counts what a process allocates, not what it maps.
MEMORY_BYTES = 2 << 30
SECONDS = 30
# Long enough to know an attack that is known to hang.
HANG_SECONDS = 5

TINY_BUNDLE = Path(__file__).parents[1] / "build" / "attacks"


@dataclass(frozen=True)
class Place:
    """Where an attack happens.

    Attributes:
      bundle: Folder of a good bundle; a copy, which the attack may spoil.
      outside: Folder beside the bundle with the file secret.txt, which nothing may read or change.
    """

    bundle: Path
    outside: Path


# Returns "harmless: ..." where there is nothing to refuse; what else it returns does not matter.
Attack = Callable[[Place], object]


class _Hang(BaseException):
    """The attack still runs after `SECONDS`."""


def run(attack: Attack, open_today: str = "") -> None:
    """Carry out an attack, print the outcome and exit.

    The exit code is 0 if the attack is refused or harmless, or if it is known to be open and does
    what it is known to do; otherwise 1.

    Args:
      attack: The attack to carry out.
      open_today: Beginning of today's outcome, for an attack that is not refused yet.
    """
    good = Path(sys.argv[1]) if len(sys.argv) > 1 else _tiny_bundle()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder) / "bundle", Path(folder) / "outside")
        shutil.copytree(good, place.bundle)
        place.outside.mkdir()
        (place.outside / "secret.txt").write_text("a secret\n", encoding="utf-8")
        seconds = HANG_SECONDS if open_today == "hang" else SECONDS
        found = outcome(attack, place, seconds)
    print(f"open, {found}" if open_today else found)
    sys.exit(not found.startswith(open_today or ("refused: ", "harmless: ")))


def outcome(attack: Attack, place: Place, seconds: int = SECONDS) -> str:
    """Return what became of an attack; see the head of this file.

    Args:
      attack: The attack to carry out.
      place: Folders to carry it out in.
      seconds: Time after which it hangs.
    """
    before = _snapshot(place.outside)
    try:
        with _limits(seconds):
            result = attack(place)
        harmless = isinstance(result, str) and result.startswith("harmless: ")
        found = str(result) if harmless else "accepted"
    except FwlError as error:
        found = f"refused: {type(error).__name__}: {error}"
    except _Hang:
        found = "hang"
    except Exception as error:
        found = f"traceback: {type(error).__name__}: {error}"
    changed = sorted(dict(before.items() ^ _snapshot(place.outside).items()))
    return f"escaped: {', '.join(changed)}" if changed else found


@contextmanager
def _limits(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hang

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _snapshot(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _tiny_bundle() -> Path:
    """Return a small random model's bundle, exported at the first use."""
    from tests.bundles import TINY, shared_bundle

    TINY_BUNDLE.mkdir(parents=True, exist_ok=True)
    return shared_bundle(TINY_BUNDLE, "fp32", TINY)


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest.

    Args:
      bundle: Folder of the bundle.
      change: Function that changes the manifest's JSON data in place.
    """
    path = bundle / MANIFEST_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def list_file(bundle: Path, name: str) -> None:
    """Record a file in the manifest with the hash it has now, as an attacker would.

    Args:
      bundle: Folder of the bundle.
      name: Path of the file inside the bundle.
    """
    entry = describe_file(bundle / name)
    edit_manifest(bundle, lambda data: data["files"].update({name: entry}))


@contextmanager
def edited_model(bundle: Path) -> Iterator[onnx.ModelProto]:
    """Yield the ONNX model without its external data; write it back and record its new hash.

    Args:
      bundle: Folder of the bundle.
    """
    import onnx

    path = bundle / MODEL_FILE
    model = onnx.load(str(path), load_external_data=False)
    yield model
    path.write_bytes(model.SerializeToString())
    list_file(bundle, MODEL_FILE)


def saved_state(place: Place) -> Path:
    """Return a good state file of the bundle, with one row of 20 tokens.

    Args:
      place: Folders of the attack; the file is written beside them.
    """
    from fwl_export.runtimes import open_session

    session = open_session(place.bundle)
    session.feed(list(range(20)))
    path = place.bundle.with_name("good.state")
    session.save_state(path)
    return path


def load_state(place: Place, path: Path) -> object:
    """Load a state file into a new session of the bundle, and read a token.

    Args:
      place: Folders of the attack.
      path: State file to load.
    """
    from fwl_export.runtimes import open_session

    session = open_session(place.bundle)
    session.load_state(path)
    return session.feed([1])


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file.

    Args:
      path: File to read.
    """
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(
    path: Path, header: Mapping[str, Any] | str, data: bytes, size: int | None = None
) -> Path:
    """Write a safetensors file byte by byte, whether it makes sense or not; returns its path.

    Args:
      path: File to write.
      header: JSON header, as data or as text.
      data: Bytes after the header.
      size: Size of the header that the file claims; None claims the true one.
    """
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def signed(header: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Return a state file's header with the checksum that its content now has.

    Whoever can change a state file can do this too: the checksum finds damage, not malice.

    Args:
      header: JSON header of the file.
      data: Bytes after the header.
    """
    digest = hashlib.sha256()
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    for name in sorted(header.keys() - {"__metadata__"}, key=str.encode):
        entry = header[name]
        shape = ",".join(map(str, entry["shape"]))
        digest.update(f"{name}\n{entry['dtype']}\n{shape}\n".encode())
        digest.update(data[slice(*entry["data_offsets"])])
    for key in sorted(metadata, key=str.encode):
        digest.update(f"{key}\n{metadata[key]}\n".encode())
    return {**header, "__metadata__": {**metadata, "sha256": digest.hexdigest()}}


def open_and_read(place: Place) -> object:
    """Open the bundle and read a token, as an application would.

    Args:
      place: Folders of the attack.
    """
    from fwl_export.runtimes import open_session

    return open_session(place.bundle).feed([1])


def load_checkpoint(place: Place) -> Checkpoint:
    """Load the checkpoint inside the bundle.

    Args:
      place: Folders of the attack.
    """
    from fwl_export.model.checkpoint import load_checkpoint as load

    return load(place.bundle / "checkpoint")


def read_all(place: Place) -> None:
    """Read the manifest and check every file's hash.

    Args:
      place: Folders of the attack.
    """
    read_bundle(place.bundle).verify()
