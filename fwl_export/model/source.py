"""What a path holds: a checkpoint, a language model of Hugging Face, or what people give instead.

Nothing is loaded here. `what_is` reads names and a config.json, so that a wrong path ends in a
sentence about what lies there, before transformers or PyTorch say something about its parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwl_export.errors import CheckpointError
from fwl_export.files import finish_replacement
from fwl_export.json_files import read_json, shown
from fwl_export.model.stored import CONFIG_FILE, WEIGHTS_FILE

# Kinds of sources that one command or another takes; `OTHER` is taken by none.
CHECKPOINT, LAYER, HUGGING_FACE, GGUF, BUNDLE, OTHER = (
    "checkpoint", "layer", "hugging face", "gguf", "bundle", "other"
)  # fmt: skip

EXPECTED = (
    f"expected a folder with {CONFIG_FILE}, {WEIGHTS_FILE} and tokenizer.json: a checkpoint, as "
    "`fwl-export train` and `fwl-export import` write it, or a language model of Hugging Face"
)
ADAPTER_FILE = "adapter_config.json"
INDEX_FILE = "model.safetensors.index.json"
_MANIFEST_FILE = "manifest.json"

_UNPACK = "unpack it and give the folder"
_CONVERT = (
    "other formats can run code when they are loaded. Convert it where you trust it: "
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('OLD').save_pretrained('NEW')\", and copy tokenizer.json to NEW"
)
_FILES: dict[str, tuple[str, str]] = {
    ".gguf": ("is a GGUF file", "give it as the backbone"),
    ".safetensors": (
        "is one file of weights",
        "give the folder that holds it, with config.json and tokenizer.json beside it",
    ),
    ".json": ("is a JSON file", "give the folder that holds it"),
    ".onnx": ("is an ONNX file", "give the checkpoint that it was exported from"),
    ".toml": (
        "is a TOML file",
        "run it with `fwl-export train`, and give the folder that it writes",
    ),
    **dict.fromkeys((".zip", ".gz", ".tgz", ".tar", ".7z"), ("is an archive", _UNPACK)),
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        (
            "is a pickle, which can run code when it is loaded",
            "load it in PyTorch where you trust it, and write a checkpoint as "
            "docs/howto/bring-your-model.md says",
        ),
    ),
}
# Other formats of weights, by a file that only they have; in a folder without safetensors.
_FORMATS = {
    "pytorch_model*.bin": "a pickle",
    "*.bin": "a pickle",
    "*.pt": "a pickle",
    "*.pth": "a pickle",
    "tf_model.h5": "TensorFlow's weights",
    "flax_model*.msgpack": "Flax's weights",
    "*.gguf": "a GGUF file",
    "*.onnx": "an ONNX file",
}
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "GenerationDecoder")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """A path, and what it holds.

    Attributes:
      path: The path as it was given.
      kind: `CHECKPOINT`, `LAYER`, `HUGGING_FACE`, `GGUF`, `BUNDLE` or `OTHER`.
      what: What it is, in words that follow the path in a sentence.
      remedy: What to do about it; "" if that depends on who asks.
    """

    path: Path
    kind: str
    what: str
    remedy: str = ""

    def refusal(self, name: str, expected: str) -> CheckpointError:
        """Return the error of a command that does not take this source.

        Args:
          name: What the command calls the path, such as "checkpoint" or "'backbone'".
          expected: What the command takes, or what to do; ends the message if there is no remedy.
        """
        return CheckpointError(f"{name} '{self.path}' {self.what}; {self.remedy or expected}")


def what_is(path: Path) -> Source:
    """Return what a path holds, or why it is of no use.

    Raises:
      CheckpointError: A config.json cannot be read.
    """
    path = Path(path)
    if not path.exists():
        finish_replacement(path)  # whoever replaced it may have been killed meanwhile
    if not path.exists():
        return Source(path, OTHER, "does not exist", _if_it_is_a_name(path))
    if not path.is_dir():
        what, remedy = _FILES.get(path.suffix.lower(), ("is not a folder", ""))
        return Source(path, GGUF if path.suffix.lower() == ".gguf" else OTHER, what, remedy)
    for found in (_marked_folder(path), _configured_folder(path)):
        if found:
            return found
    return Source(path, OTHER, f"has no {CONFIG_FILE}", _without_config(path))


def check_language_model(folder: Path, config: dict[str, Any]) -> None:
    """Check that a folder of Hugging Face holds a decoder-only language model that can be read.

    Args:
      folder: Path of the folder.
      config: Content of its config.json.

    Raises:
      CheckpointError: It holds something else, or its weights are missing or in another format.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise what_is(folder).refusal("backbone", "")
    _check_weights(folder)
    _check_architecture(folder, config)


def _marked_folder(path: Path) -> Source | None:
    """Return what a folder is that one file or folder in it gives away, or None."""
    if (path / _MANIFEST_FILE).is_file():
        return Source(path, BUNDLE, "is a bundle, an exported model")
    if (path / ADAPTER_FILE).is_file():
        return Source(
            path, OTHER, "is a PEFT adapter, which only changes another model", _merge(path)
        )
    if (path / "model_index.json").is_file():
        return Source(path, OTHER, "is a pipeline of diffusers", "give a language model")
    if (path / "snapshots").is_dir():
        inside = sorted(p for p in (path / "snapshots").iterdir() if (p / CONFIG_FILE).exists())
        which = f"give '{inside[-1]}'" if inside else "it holds no snapshot of a model"
        return Source(path, OTHER, "is a folder of the Hugging Face cache", which)
    if (path / "checkpoint" / CONFIG_FILE).is_file():
        return Source(
            path, OTHER, "is the folder of a training run", f"give '{path / 'checkpoint'}'"
        )
    return None


def _configured_folder(path: Path) -> Source | None:
    """Return what a folder is by its config.json, or None if it has none."""
    if not (path / CONFIG_FILE).is_file():
        return None
    config = read_json(path / CONFIG_FILE, CheckpointError)
    keys = set(config) if isinstance(config, dict) else set()
    if "backbone" in keys:
        return Source(path, CHECKPOINT, "is a checkpoint of a whole model")
    if "fast_weights" in keys:
        what = "is a Fast Weight Layer alone, without a backbone"
        return Source(path, LAYER, what, "give it as --fwl, with a --backbone")
    if "schema_version" in keys:  # ours, but damaged: whoever loads it says how
        return Source(path, CHECKPOINT, "is a checkpoint")
    if keys & {"model_type", "architectures"}:
        what = "is a language model of Hugging Face, without a Fast Weight Layer"
        return Source(path, HUGGING_FACE, what)
    found = shown(", ".join(sorted(keys)) if keys else config)
    return Source(
        path,
        OTHER,
        f"has a {CONFIG_FILE} of an unknown kind, with {found}",
        "expected schema_version, as `fwl-export train` writes it, or model_type, as transformers "
        "does",
    )


def _if_it_is_a_name(path: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return (
            f"nothing is downloaded here. If it is a name on the Hugging Face hub, fetch it with "
            f"`hf download {path} --local-dir FOLDER`, and give FOLDER"
        )
    return ""


def _merge(path: Path) -> str:
    config = read_json(path / ADAPTER_FILE, CheckpointError)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    named = f", {shown(base)}," if isinstance(base, str) and base else ""
    return (
        f"load it on its base model{named} with peft, and give the folder that "
        "merge_and_unload().save_pretrained(FOLDER) writes"
    )


def _without_config(path: Path) -> str:
    if (path / "params.json").is_file() or any(path.glob("consolidated.*")):
        return "it has weights in their authors' own format; give the version for transformers"
    if found := sorted(path.glob("*.gguf")):
        return f"it has GGUF files; give one of them, such as '{found[0]}'"
    if any(path.glob("*.safetensors")):
        return "it has weights only; copy config.json and tokenizer.json of the model beside them"
    return EXPECTED


def _check_weights(folder: Path) -> None:
    """Check that a folder has weights in safetensors: all of them, and not only pointers."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        other = next((k for p, k in _FORMATS.items() if any(folder.glob(p))), "")
        held = f" but {other}" if other else ""
        raise CheckpointError(f"backbone '{folder}' has no safetensors{held}; {_CONVERT}")
    _check_shards(folder)
    for path in weights:
        with path.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                raise CheckpointError(
                    f"'{path}' is a pointer of Git LFS and not the weights; run `git lfs pull` in "
                    f"'{folder}'"
                )


def _check_shards(folder: Path) -> None:
    path = folder / INDEX_FILE
    if not path.is_file() or (folder / WEIGHTS_FILE).is_file():
        return
    data = read_json(path, CheckpointError)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{path} has no weight_map; copy or download it again")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / Path(name).name).is_file()]
    if missing:
        raise CheckpointError(
            f"backbone '{folder}' lacks {len(missing)} of the {len(names)} files of weights that "
            f"{INDEX_FILE} names, e.g. {shown(missing[0])}; copy or download it again"
        )


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    kind = shown(config.get("model_type", "of an unknown type"))
    remedy = "expected a decoder-only language model, such as LlamaForCausalLM or GPT2LMHeadModel"
    if config.get("is_encoder_decoder") is True:
        raise CheckpointError(f"backbone '{folder}' is an encoder-decoder model ({kind}); {remedy}")
    found = config.get("architectures")
    names = [n for n in found if isinstance(n, str)] if isinstance(found, list) else []
    heads = [name for name in names if not name.endswith("Model") or name.endswith(_CAUSAL)]
    if heads and not any(name.endswith(_CAUSAL) for name in heads):
        raise CheckpointError(f"backbone '{folder}' is a {shown(heads[0])[1:-1]}; {remedy}")
