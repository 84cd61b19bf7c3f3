"""Record on every traced operator the module and method it comes from.

The export carries these names through, so that a tensor can be located in the model. PyTorch's
tracer records only calls of modules, but methods do a model's work too: the two passes of the Fast
Weight Layer are the methods `slow` and `fast` of one module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import nn
from torch.fx import Node, traceback

_KEY = "fwl_scope"


@contextmanager
def named_scopes(root: nn.Module) -> Iterator[None]:
    """Record on every operator that is traced in the block the method that calls it.

    Args:
      root: The module whose submodules record their calls while the block runs.
    """
    wrapped: list[tuple[nn.Module, str]] = []
    stack: list[tuple[str, str]] = []
    try:
        for path, module in root.named_modules():
            for name in _methods(module):
                noting = _noting(getattr(module, name), (path, name), stack)
                object.__setattr__(module, name, noting)
                wrapped.append((module, name))
        with traceback.preserve_node_meta():
            yield
    finally:
        for module, name in wrapped:
            object.__delattr__(module, name)


def scope_of(node: Node) -> str:
    """Return where a node was traced: the path of a module and one of its methods.

    `fast_weights.slow/normalize` is the method `normalize` of the module `fast_weights`, called by
    its method `slow`. The result is empty for a node outside all modules.
    """
    return str((node.meta.get("custom") or {}).get(_KEY, ""))


def _methods(module: nn.Module) -> list[str]:
    """Return `forward` and the methods of the module's own class."""
    kind = type(module)
    own = [name for name, value in vars(kind).items() if isinstance(value, FunctionType)]
    if kind.__module__.partition(".")[0] == "torch":
        own = ["forward"]
    return [name for name in own if not name.startswith("__")]


def _noting(
    method: Callable[..., Any], called: tuple[str, str], stack: list[tuple[str, str]]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def noting(*arguments: Any, **options: Any) -> Any:
        stack.append(called)
        try:
            with traceback.annotate({_KEY: _label(stack)}):
                return method(*arguments, **options)
        finally:
            stack.pop()

    return noting


def _label(stack: list[tuple[str, str]]) -> str:
    path = stack[-1][0]
    methods: list[str] = []
    for other, method in reversed(stack):
        if other != path:
            break
        if method != "forward":  # `forward` stands for the module itself
            methods.insert(0, method)
    return ".".join(part for part in (path, "/".join(methods)) if part)
