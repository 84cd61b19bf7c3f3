"""Read repeated tokens with an exported file, to see that its numbers stay finite.

A model in float16 can read books and fail on a page of blank lines: what it learns from one thing,
repeated, grows to many times what it learns from text. So every export that is not in float32
throughout reads such texts once, see `bundle.repetition`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fwl_export.bundle.config import ModelConfig
from fwl_export.bundle.repetition import LENGTH, Repetition
from fwl_export.bundle.state import PAST, PRESENT, TensorSpec, zeros
from fwl_export.errors import ExportError
from fwl_export.model.streaming import INPUTS
from fwl_export.ort import import_onnxruntime

_Array = npt.NDArray[Any]

# The slow pass computes the logits of all rows and tokens of a call; 128 MB of them in float32.
_LOGITS_AT_ONCE = 1 << 25
_LOGITS_EVERY = 8  # tokens between two logits that are returned


class NotFinite(NamedTuple):
    """Where the output of a model is not finite.

    Attributes:
      text: The repeated text.
      token: Number of its tokens before the one at fault.
      tensor: "logits", or the name of a state tensor.
    """

    text: Repetition
    token: int
    tensor: str

    @property
    def token_id(self) -> int:
        """Id of the token at fault."""
        return self.text.ids[self.token % len(self.text.ids)]


@dataclass(frozen=True)
class RepeatedReading:
    """Reads texts of repeated tokens with an ONNX file, all rows side by side.

    Attributes:
      session: ONNX Runtime's session of the file.
      specs: The state tensors of the model.
      config: The model's configuration.
      max_tokens: Largest number of tokens per call.
    """

    session: Any
    specs: Sequence[TensorSpec]
    config: ModelConfig
    max_tokens: int

    @classmethod
    def of(
        cls, path: Path, specs: Sequence[TensorSpec], config: ModelConfig, max_tokens: int
    ) -> RepeatedReading:
        """Load an ONNX file; for arguments see the attributes."""
        onnxruntime = import_onnxruntime("export, which reads repeated tokens with the file,")
        session = onnxruntime.InferenceSession(
            str(path), providers=["CPUExecutionProvider"], enable_fallback=0
        )
        return cls(session, specs, config, max_tokens)

    def first_not_finite(
        self, texts: Sequence[Repetition], length: int = LENGTH
    ) -> NotFinite | None:
        """Return where the output of the model is first not finite, or None.

        Args:
          texts: The texts, each different from the others.
          length: Tokens to read of each, if the model can read so many.
        """
        length = min(length, self.config.backbone.max_positions or length)
        rows = max(_LOGITS_AT_ONCE // (self.max_tokens * self.config.vocab_size), 1)
        for start in range(0, len(texts), rows):
            if found := self._read(texts[start : start + rows], length):
                return found
        return None

    def _read(self, texts: Sequence[Repetition], length: int) -> NotFinite | None:
        state = {PAST + name: array for name, array in zeros(self.specs, len(texts)).items()}
        for start, size in self._calls(length):
            ids = np.stack([text.read(start, size) for text in texts])
            wanted = np.unique(np.append(np.arange(_LOGITS_EVERY, size, _LOGITS_EVERY), size - 1))
            found = self._run(ids, wanted, state)
            wrong = ~np.isfinite(found["logits"]).all(-1)
            if wrong.any():
                row, place = map(int, np.argwhere(wrong)[0])
                logits = self._run(ids, np.arange(wanted[place] + 1), state)["logits"][row]
                first = int(np.argmax(~np.isfinite(logits).all(-1)))
                return NotFinite(texts[row], start + first, "logits")
            for spec in self.specs:
                array = found[PRESENT + spec.name]
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    row = int(np.argwhere(~np.isfinite(array))[0][0])
                    return NotFinite(texts[row], start + size - 1, spec.name)
            state = {PAST + spec.name: found[PRESENT + spec.name] for spec in self.specs}
        return None

    def _calls(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield start and size of every call; none crosses an anchor."""
        start, interval = 0, self.config.fast_weights.anchor_interval
        while start < length:
            size = min(self.max_tokens, length - start)
            if interval:
                size = min(size, interval - start % interval)
            yield start, size
            start += size

    def _run(self, ids: _Array, wanted: _Array, state: dict[str, _Array]) -> dict[str, _Array]:
        batch, size = ids.shape
        values = (
            ids,
            np.ones((batch, size), np.float32),
            np.full(batch, size, np.int64),
            np.tile(wanted, (batch, 1)),
            np.ones(batch, np.float32),
        )
        names = [output.name for output in self.session.get_outputs()]
        feeds = {**dict(zip(INPUTS, values, strict=True)), **state}
        return dict(zip(names, self.session.run(names, feeds), strict=True))


def refusal(found: NotFinite, precision: str, token_text: str) -> ExportError:
    """Return the error of an export whose model is not finite.

    Args:
      found: What is not finite, and where.
      precision: Precision of the export, e.g. "fp16".
      token_text: Text of the repeated token; "" if it has none.
    """
    text = f", text {token_text!r}" if token_text else ""
    way = (
        "leave more parts in float32, see `fwl-export precision`"
        if precision != "fp16"
        else "export with --precision fp32, or with a policy of `fwl-export precision`, which "
        "keeps some parts in float32"
    )
    return ExportError(
        f"in {precision} the model is not finite on a text that repeats one thing "
        f"({found.text.name}, token id {found.token_id}{text}): {found.tensor} after token "
        f"{found.token} has NaN or infinite values. "
        f"Most likely a number is too large for its type. Nothing was written: {way}"
    )
