"""Read text files of any length: in UTF-8, line ends as they are, in pieces."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fwl_export.errors import TokenError
from fwl_export.filesystem import open_regular

# The name that stands for standard input where a file is expected.
STANDARD_INPUT = Path("-")

_CHUNK = 1 << 20  # bytes
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class TextFile:
    """A text that is read piece by piece.

    Attributes:
      name: What to call the file in messages.
      size: Size in bytes; 0 if it is not known, as of standard input.
      read_bytes: Number of bytes read so far.
    """

    def __init__(self, stream: BinaryIO, name: str, size: int = 0) -> None:
        """Begin to read a stream.

        Args:
          stream: Stream of bytes, at its beginning.
          name: What to call the file in messages.
          size: Size in bytes; 0 if it is not known.
        """
        self.name = name
        self.size = size
        self.read_bytes = 0
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._ended = False

    def read(self, characters: int) -> str:
        """Return the next characters; fewer than asked for at the end of the text only.

        Args:
          characters: How many characters to read.

        Raises:
          TokenError: The file is not UTF-8 text, or cannot be read.
        """
        parts, missing = [self._text], characters - len(self._text)
        while missing > 0 and not self._ended:
            parts.append(self._next())
            missing -= len(parts[-1])
        text = "".join(parts)
        self._text = text[characters:]
        return text[:characters]

    def _next(self) -> str:
        """Return the text of the next bytes."""
        try:
            content = self._stream.read(_CHUNK)
        except OSError as error:
            raise TokenError(f"cannot read {self.name} as text: {error}") from None
        if not self.read_bytes:
            content = self._without_mark(content)
        pending = len(self._decoder.getstate()[0])
        self._ended = not content
        try:
            text = self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            place = self.read_bytes - pending + error.start
            raise TokenError(
                f"cannot read {self.name} as text: byte {place} is "
                f"0x{error.object[error.start]:02x}, which is not UTF-8 ({error.reason}); expected "
                "a text in UTF-8"
            ) from None
        self.read_bytes += len(content)
        return text

    def _without_mark(self, content: bytes) -> bytes:
        """Return the beginning of the file without its byte-order mark."""
        while content and len(content) < 4 and (more := self._stream.read(4 - len(content))):
            content += more  # a pipe may bring it byte by byte
        for mark, encoding in _OTHER_MARKS.items():
            if content.startswith(mark):
                raise TokenError(
                    f"cannot read {self.name} as text: it is {encoding}, as its byte-order mark "
                    f"says; expected UTF-8: convert it, e.g. with `iconv -f {encoding} -t UTF-8`"
                )
        if content.startswith(codecs.BOM_UTF8):
            self.read_bytes = len(codecs.BOM_UTF8)
            rest = content[len(codecs.BOM_UTF8) :]
            return rest or self._stream.read(_CHUNK)
        return content


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextFile]:
    """Open a text file.

    Args:
      path: Text file in UTF-8; `STANDARD_INPUT` reads standard input. Other pipes and devices are
        refused, since they may have no end.

    Raises:
      TokenError: The file cannot be read.
    """
    if path == STANDARD_INPUT:
        if sys.stdin is None:
            raise TokenError("cannot read standard input as text: it is closed")
        yield TextFile(sys.stdin.buffer, "standard input")
        return
    try:
        stream = open_regular(path, TokenError)
    except OSError as error:
        raise TokenError(f"cannot read '{path}' as text: {error}") from None
    with stream:
        yield TextFile(stream, f"'{path}'", os.fstat(stream.fileno()).st_size)


def read_text(path: Path) -> str:
    """Return the whole content of a text file; see `open_text`.

    Raises:
      TokenError: The file is not UTF-8 text, or cannot be read.
    """
    with open_text(path) as file:
        parts = iter(lambda: file.read(_CHUNK), "")
        return "".join(parts)
