"""What the caller asks of a builder: one engine for one GPU architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Range:
    """Sizes of the dynamic axes in one optimization profile, each as (min, opt, max).

    Attributes:
      name: The profile's name, "decode" or "prefill".
      batch: Sizes of axis 0, the rows.
      tokens: Sizes of axis 1 of the inputs that have one value per token.
    """

    name: str
    batch: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class PluginUse:
    """How a build uses the plugin library.

    Attributes:
      path: Path of the library.
      in_place_state: Whether the fast-weight updates write `present` over `past`.
      embed: Whether the engine carries the library.
      required: Whether an engine that does without the plugin is an error.
    """

    path: Path
    in_place_state: bool = False
    embed: bool = False
    required: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build.

    Attributes:
      variant: Name of the TensorRT variant, see `VARIANTS`.
      model: Path of the ONNX file, with its external data beside it.
      sm: Compute capability to build for, without the dot.
      ranges: Sizes of each optimization profile.
      output: Path of the engine file to write.
      plugin: How to use the plugin library; None builds the fast-weight updates from the op's
        function body.
    """

    variant: str
    model: Path
    sm: int
    ranges: Sequence[Range]
    output: Path
    plugin: PluginUse | None = None

    @property
    def in_place_state(self) -> bool:
        """Whether the fast-weight updates write their state in place."""
        return self.plugin is not None and self.plugin.in_place_state

    @property
    def embeds_plugin(self) -> bool:
        """Whether the engine carries the plugin library."""
        return self.plugin is not None and self.plugin.embed

    @property
    def requires_plugin(self) -> bool:
        """Whether an engine that does without the plugin is an error."""
        return self.plugin is not None and self.plugin.required

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data, for another process."""
        data = asdict(self)
        data.update(model=str(self.model), output=str(self.output))
        if self.plugin is not None:
            data["plugin"]["path"] = str(self.plugin.path)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BuildRequest:
        """Read what `to_dict` returned."""
        plugin = data["plugin"]
        return cls(
            variant=data["variant"],
            model=Path(data["model"]),
            sm=data["sm"],
            ranges=[Range(**sizes) for sizes in data["ranges"]],
            output=Path(data["output"]),
            plugin=plugin and PluginUse(**{**plugin, "path": Path(plugin["path"])}),
        )
