"""Text files: line ends as they are, byte-order marks, other encodings, standard input."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from fwl_export.bundle.text_file import TextFile, open_text, read_text
from fwl_export.errors import TokenError


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\r\nb\rc\n\n", "a\r\nb\rc\n\n"),
        (b"\xef\xbb\xbfthe king", "the king"),
        (b"\xef\xbb\xbf", ""),
        (b"", ""),
        ("a\ufeffb\u2028c\x0b\x00d".encode(), "a\ufeffb\u2028c\x0b\x00d"),
        ("café 🙂".encode(), "café 🙂"),
    ],
)
def test_a_text_is_read_as_it_is(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    assert read_text(path) == text
    with open_text(path) as file:
        assert "".join(iter(lambda: file.read(1), "")) == text
        assert file.read_bytes == file.size == len(content)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffthe king".encode(encoding).removeprefix(b""))
    family = encoding[:6].upper()
    with pytest.raises(TokenError, match=f"it is {family}, as its .*iconv -f {family} -t UTF-8"):
        read_text(path)


def test_what_is_not_utf8_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * 3_000_000 + "é".encode("latin-1") + b"!")
    with pytest.raises(TokenError, match=r"as text: byte 3000003 is 0xe9, which is not UTF-8"):
        read_text(path)
    path.write_bytes("é".encode()[:1])
    with pytest.raises(TokenError, match=r"byte 0 is 0xc3.*unexpected end of data"):
        read_text(path)
    with pytest.raises(TokenError, match=r"cannot read .* as text: .*No such file"):
        read_text(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TokenError, match="is a named pipe"):
        read_text(tmp_path / "pipe")


class _ByteByByte(io.RawIOBase):
    """A pipe whose writer is slow."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self.content.read(min(size, 1) if size >= 0 else -1)


def test_a_pipe_that_brings_byte_by_byte() -> None:
    file = TextFile(_ByteByByte("\ufeffa 🙂\r\n".encode()), "standard input")  # type: ignore[arg-type] # reads
    assert file.read(100) == "a 🙂\r\n"
    with pytest.raises(TokenError, match="cannot read standard input as text: it is UTF-16"):
        TextFile(_ByteByByte("\ufeffab".encode("utf-16-le")), "standard input").read(9)  # type: ignore[arg-type] # reads


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb"), encoding="ascii"))
    assert read_text(Path("-")) == "a\r\nb"
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(TokenError, match="cannot read standard input as text: it is closed"):
        read_text(Path("-"))
