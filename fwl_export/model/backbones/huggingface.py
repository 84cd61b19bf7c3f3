"""A decoder-only language model of Hugging Face's transformers as a backbone.

An architecture fits if its attention stores keys and values in transformers' `Cache` and takes
`position_ids` and a four-dimensional mask. We give it a cache of our own: ring buffers of fixed
capacity with a position per row (see `ring.py`), so that rows, lengths and resets work as in
`decoder.py`. When a model is imported, `huggingface_import.py` finds out whether it fits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwl_export.bundle.config import HuggingFaceConfig
from fwl_export.errors import ConfigError, FwlError, MissingDependencyError
from fwl_export.model.backbones.ring import Ring, float_mask
from fwl_export.model.numerics import fitted

# Rotary phases are integers modulo this period, which are exact at any position, as in decoder.py.
# A float32 angle would be off by 0.06 rad after a million tokens. The period is larger than there,
# because the architecture prescribes the frequencies. Rounding them to multiples of 2 pi / period
# changes them by at most 3e-9 rad per token. It divides 2^32, and fits into 32 bits with its sign:
# OpenVINO computes int64 in 32 bits, and its products are then right modulo the period.
ROTARY_PERIOD = 1 << 30

# The ways in which architectures lay out cosine and sine over a head's features.
_LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda angle: torch.cat((angle, angle), -1),
    lambda angle: angle.repeat_interleave(2, -1),
    lambda angle: angle,
)


class HuggingFaceBackbone(nn.Module):
    """Turns ids [B, T] into the hidden states before the head, [B, T, width]; see `Decoder`."""

    def __init__(self, config: HuggingFaceConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        causal = causal_model(config.model)
        if causal.config.vocab_size != vocab_size:
            raise ConfigError(
                f"vocab_size is {vocab_size}, but backbone.model has {causal.config.vocab_size}; "
                "they must be equal"
            )
        self.body: Any = causal.base_model
        replace_rotary(self.body)
        self.layer_types = layer_types(self.body.config)
        self._cache_shapes = _cache_shapes(self.body)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding; a tied head shares its weights."""
        embedding: nn.Embedding = self.body.get_input_embeddings()
        return embedding

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        lists = (m for m in self.body.modules() if isinstance(m, nn.ModuleList))
        return next(m for m in lists if len(m) == len(self.layer_types))

    def forward(self, input_ids: Tensor, first: int = 0) -> Tensor:
        """Read whole texts from their beginning; see `Decoder.forward`.

        Args:
          input_ids: Token ids, [B, T] int64.
          first: Position of the first token.

        Returns:
          The hidden states, [B, T, width].

        Raises:
          ConfigError: The texts are longer than the model's context.
        """
        length, limit = input_ids.shape[1], self.config.max_positions
        if limit and length > limit:
            raise ConfigError(
                f"the texts have {length} tokens, but this model takes at most {limit}; give "
                "shorter texts"
            )
        positions = torch.arange(first, first + length, device=input_ids.device)
        masks = {}
        for kind in set(self.layer_types):
            query, key = positions[:, None], positions
            allowed = (key <= query) & (key > query - self.window(kind))
            mask = float_mask(allowed, self._mask_type)[None, None]
            masks[kind] = mask.expand(len(input_ids), -1, -1, -1)
        return self._run(input_ids, positions.expand_as(input_ids), masks, None)

    def stream(
        self, input_ids: Tensor, position: Tensor, lengths: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Read the next tokens of every row; see `Decoder.stream`.

        A row that goes beyond `max_positions` gets meaningless hidden states.
        """
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = position[:, None] + steps
        rings: dict[str, Ring] = {}
        layers: list[Any] = []
        for index, kind in enumerate(self.layer_types):
            keys, values = caches[2 * index : 2 * index + 2]
            if kind not in rings:
                rings[kind] = Ring(position, lengths, steps, keys.shape[2])
            layers.append(_ring_layer()(rings[kind], keys, values))
        masks = {
            kind: ring.mask(positions, self.window(kind), self._mask_type)
            for kind, ring in rings.items()
        }
        if limit := self.config.max_positions:  # the model's table of positions ends there
            positions = positions.clamp(max=limit - 1)
        hidden = self._run(input_ids, positions, masks, layers)
        return hidden, [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def window(self, kind: str) -> int:
        """Return the number of tokens that a query sees in layers of a type, itself included."""
        if kind == "sliding_attention":
            return int(self.body.config.sliding_window)
        return self.config.window

    def cache_specs(self, capacity: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names of the caches, and their shapes without the batch axis.

        Args:
          capacity: Number of tokens that a layer with full attention holds; it suffices for calls
            of up to `capacity - window + 1` tokens.
        """
        max_tokens = capacity - self.config.window + 1
        specs: list[tuple[str, tuple[int, ...]]] = []
        for layer, (kind, shapes) in enumerate(
            zip(self.layer_types, self._cache_shapes, strict=True)
        ):
            slots = self.window(kind) + max_tokens - 1
            if kind != "sliding_attention" and self.config.max_positions:
                slots = max(self.config.max_positions, max_tokens)  # the ring never wraps around
            for name, (heads, size) in zip(("key", "value"), shapes, strict=True):
                specs.append((f"cache.{layer}.{name}", (heads, slots, size)))
        return specs

    @property
    def activation_type(self) -> torch.dtype:
        """The dtype of the body's activations: that of its last vector, a norm's.

        A matrix may have another one, see `fwl_export.precision.policy`.
        """
        *_, last = (p.dtype for p in self.body.parameters() if p.ndim == 1)
        return last

    @property
    def _mask_type(self) -> torch.dtype:
        # That of attention scores, see _WideScores.
        kind = self.activation_type
        return torch.float32 if kind == torch.float16 else kind

    def _run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        masks: dict[str, Tensor],
        layers: list[Any] | None,
    ) -> Tensor:
        # An architecture with one type of layers takes a mask; one with several takes one per type.
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        context = _CONTEXTS.get(self.activation_type, contextlib.nullcontext)
        with context():
            output = self.body(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=layers is not None,
                **({} if layers is None else {cache_argument(self.body): _cache(layers)}),
            )
        hidden: Tensor = output.last_hidden_state
        return hidden


class ExactRotary(nn.Module):
    """Computes cosine and sine from exact phases; replaces an architecture's own rotary module.

    Buffers: `<kind>cycles` [pairs] int64, the frequencies in 1 / ROTARY_PERIOD turns per token.
    """

    def __init__(self, frequencies: dict[str, Tensor], scales: dict[str, float], layout: int):
        """Build the module from an architecture's frequencies.

        Args:
          frequencies: Frequencies in rad per token, [pairs], by type of layer; "" is the only key
            if all layers have the same.
          scales: Factor on cosine and sine, by type of layer.
          layout: Layout of a head's features, an index into `_LAYOUTS`.
        """
        super().__init__()
        self._scales, self._layout = scales, layout
        for kind, values in frequencies.items():
            cycles = (values.double() * (ROTARY_PERIOD / (2 * math.pi))).round().long()
            self.register_buffer(f"{kind}cycles", cycles, persistent=False)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of positions [B, T], [B, T, features] each, in the dtype of x."""
        kind = f"{layer_type}_" if layer_type else ""
        positions = torch.remainder(position_ids, ROTARY_PERIOD)[..., None]
        phase = torch.remainder(positions * getattr(self, f"{kind}cycles"), ROTARY_PERIOD)
        angle_type = torch.float64 if x.dtype == torch.float64 else torch.float32
        angle = _LAYOUTS[self._layout](phase.to(angle_type) * (2 * math.pi / ROTARY_PERIOD))
        scale = self._scales[kind]
        return (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)


def replace_rotary(body: nn.Module) -> None:
    """Replace every rotary module that computes the same as an `ExactRotary` by one.

    Raises:
      ConfigError: The frequencies depend on the length of the text, which a stream does not know.
    """
    for name, module in list(body.named_modules()):
        buffers = [key for key, _ in module.named_buffers(recurse=False)]
        is_rotary = any(key.endswith("inv_freq") for key in buffers)
        if is_rotary and (exact := _exact_rotary(module)):
            body.set_submodule(name, exact)


def _exact_rotary(module: nn.Module) -> ExactRotary | None:
    kinds = getattr(module, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind in ("dynamic", "longrope"):
            raise ConfigError(
                f"rope_type '{kind}' changes the rotary frequencies with the length of the text, "
                "which is unknown while streaming; choose a model with another rope_type"
            )
    frequencies = {
        name.removesuffix("inv_freq"): buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
    scales = {k: float(getattr(module, f"{k}attention_scaling", 1.0)) for k in frequencies}
    x, positions = torch.zeros(1, 16, 1), torch.arange(16)[None]
    for layout in range(len(_LAYOUTS)):
        exact = ExactRotary(frequencies, scales, layout)
        if all(_same_rotary(module, exact, x, positions, kind) for kind in frequencies):
            return exact
    return None


def _same_rotary(
    module: nn.Module, exact: ExactRotary, x: Tensor, positions: Tensor, kind: str
) -> bool:
    arguments = (x, positions, kind.removesuffix("_")) if kind else (x, positions)
    try:
        own, ours = module(*arguments), exact(*arguments)
    except (TypeError, RuntimeError, KeyError, AttributeError):
        return False
    # Rounded frequencies change an angle by at most 4.5e-5 rad at position 15; allow twice that.
    # With another layout, values differ by 0.1 or more.
    return (
        isinstance(own, tuple)
        and len(own) == 2
        and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-4)
            for a, b in zip(own, ours, strict=True)
        )
    )


def causal_model(config: dict[str, Any]) -> Any:
    """Return a randomly initialized language model of transformers, in float32.

    Args:
      config: The model's configuration as transformers writes it, with its `model_type`.

    Raises:
      ConfigError: transformers cannot build a language model from the configuration.
      MissingDependencyError: transformers is not installed.
    """
    transformers = import_transformers()
    refuse_code(config, ConfigError)
    kind = config["model_type"]
    try:
        settings = transformers.AutoConfig.for_model(**copy.deepcopy(config))
        return transformers.AutoModelForCausalLM.from_config(
            settings, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        ).eval()
    except Exception as error:  # transformers raises exceptions of many unrelated classes
        raise ConfigError(
            f"transformers {transformers.__version__} cannot build a language model of "
            f"model_type '{kind}' from this config "
            f"({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None


def refuse_code(config: Any, error: type[FwlError]) -> None:
    """Refuse a configuration that makes transformers fetch and run code from elsewhere.

    A name with a slash in a setting such as `attn_implementation`, at any depth, is that of a
    repository of kernels.

    Args:
      config: Configuration, as it was read from JSON.
      error: Class of the exception to raise.

    Raises:
      FwlError: It names such a repository; raised as `error`.
    """
    left = [config]
    while left:
        part = left.pop()
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        for key, value in part.items() if isinstance(part, dict) else ():
            names = value.values() if isinstance(value, dict) else [value]
            is_code = key.endswith("_implementation") and any("/" in str(name) for name in names)
            if is_code or (key == "use_kernels" and value):
                raise error(
                    f"the model's config sets {key} to {value!r}, which makes transformers fetch "
                    "and run code; remove it: this package computes attention in its own way"
                )


def import_transformers() -> Any:
    """Import the package transformers.

    Raises:
      MissingDependencyError: The package is not installed, or is too old.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "Hugging Face backbones need the package transformers, which is not installed; "
            "pip install 'fwl-export[hf]'"
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingDependencyError(
            f"Hugging Face backbones need transformers 5 or newer, but {transformers.__version__} "
            "is installed; pip install -U 'fwl-export[hf]'"
        )
    return transformers


def layer_types(config: Any) -> list[str]:
    """Return the type of every layer, "full_attention" or "sliding_attention".

    Args:
      config: The configuration object of transformers.

    Raises:
      ConfigError: A layer has another type.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"architecture '{config.model_type}' has layers of type '{kind}'; expected "
                "full_attention or sliding_attention, whose keys and values fit into ring buffers"
            )
    return list(kinds)


@functools.cache
def _ring_layer() -> Any:
    """Return the class of our cache's layers, defined here because transformers is optional."""
    from transformers.cache_utils import CacheLayerMixin

    class RingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
        """Keys and values of one layer [B, heads, capacity, size] for one call."""

        is_compileable = True
        is_sliding = False

        def __init__(self, ring: Ring, keys: Tensor, values: Tensor) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self._ring = ring
            self.keys: Tensor = keys
            self.values: Tensor = values
            self.is_initialized = True

        def lazy_initialization(self, *_: Any, **__: Any) -> None:
            """Do nothing; the constructor has initialized the layer."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            """Write the call's keys and values, and return all slots to attend to."""
            self.keys = self._ring.write(self.keys, key_states)
            self.values = self._ring.write(self.values, value_states)
            return self.keys, self.values

        def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
            """Return the number of slots and the offset of the first."""
            return self.keys.shape[2], 0

        def get_seq_length(self, *_: Any) -> int:
            """Return 0, because positions are passed in and must not be counted from here."""
            return 0

        def get_max_length(self) -> int:
            """Return the number of slots."""
            return self.keys.shape[2]

        def get_max_cache_shape(self) -> int:
            """Return the number of slots; early releases of transformers 5 call this method."""
            return self.keys.shape[2]

    return RingLayer


def _cache(layers: list[Any]) -> Any:
    from transformers.cache_utils import Cache

    return Cache(layers=layers)


def cache_argument(body: nn.Module) -> str:
    """Return the name of a model's argument for its cache, which depends on transformers' release.

    Raises:
      ConfigError: The model takes no cache.
    """
    parameters = inspect.signature(body.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise ConfigError(
        f"{type(body).__name__} takes no cache of keys and values; expected a decoder whose "
        "attention goes through transformers' Cache"
    )


def _cache_shapes(body: Any) -> list[list[tuple[int, int]]]:
    """Return the (heads, size) of the key and the value of every layer, found by a trial call.

    Raises:
      ConfigError: A layer does not write to the cache.
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        body(
            input_ids=torch.zeros(1, 2, dtype=torch.int64),
            use_cache=True,
            **{cache_argument(body): cache},
        )
    layers: list[Any] = [x for x in cache.layers if getattr(x, "keys", None) is not None]
    if len(layers) != body.config.num_hidden_layers:
        raise ConfigError(
            f"architecture '{body.config.model_type}': {len(layers)} of its "
            f"{body.config.num_hidden_layers} layers store keys and values in transformers' Cache; "
            "expected all of them to do so"
        )
    return [[(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)] for layer in layers]


class _Double(TorchFunctionMode):
    """Context in which a float64 model computes in float64 where its code asks for float32.

    The norms and softmax of transformers compute in float32 whatever the model's dtype. That suits
    half precision, but a float64 model is a reference here and must not lose half of its digits.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


class _WideScores(TorchFunctionMode):
    """Context in which the attention scores of a float16 model are float32.

    Published models have keys of several hundreds, and a product of a query and a key of a hundred
    features then exceeds 65504. So queries are scaled before the product, and scores after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attending = False  # whether softmax has made scores into weights of the values

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SOFTMAX:
            self._attending = True
        elif func in _MATMUL and all(x.ndim == 4 and x.dtype == torch.float16 for x in args[:2]):
            scores, self._attending = not self._attending, False
            if scores:
                query, scale = fitted(args[0], torch.float16, _LARGEST_QUERY)
                assert scale is not None
                return func(query, args[1]).float() * scale
        return func(*args, **(kwargs or {}))


_SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
# The scores of keys up to 4000 then fit, with 256 features per head.
_LARGEST_QUERY = 2.0**-4
_CONTEXTS: dict[torch.dtype, Callable[[], Any]] = {
    torch.float64: _Double,
    torch.float16: _WideScores,
}
