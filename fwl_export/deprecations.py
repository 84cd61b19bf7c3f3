"""Old names of modules, attributes and arguments: they work with a warning until 0.3."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The release in which the old names stop working.
REMOVED_IN = "0.3"

MODULES = {
    "fwl_export.export.precision": "fwl_export.precision.policy",
    "fwl_export.model.config": "fwl_export.bundle.config",
    "fwl_export.onnx_file": "fwl_export.bundle.onnx_file",
    "fwl_export.parity.backends": "fwl_export.parity.candidates",
    "fwl_export.parity.bisect": "fwl_export.bisect",
    "fwl_export.parity.html": "fwl_export.parity.report.html",
    "fwl_export.parity.junit": "fwl_export.parity.report.junit",
    "fwl_export.parity.run": "fwl_export.parity.check",
    "fwl_export.parity.summary": "fwl_export.parity.report.text",
    "fwl_export.state": "fwl_export.bundle.state",
    "fwl_export.state_file": "fwl_export.bundle.state_file",
    "fwl_export.text": "fwl_export.bundle.tokenizer",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports moved modules by their old names; a module's content is that of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MODULES[spec.name]
        _warn(f"{spec.name} is now {new}")
        # A copy, because the import system writes the old name's spec into the module it gets.
        moved = ModuleType(spec.name)
        moved.__dict__.update(vars(importlib.import_module(new)))
        return moved

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: `create_module` has filled the module."""


def _warn(change: str) -> None:
    """Warn whoever called the caller that a name has changed."""
    message = f"{change}; the old name stops working in {REMOVED_IN}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def install() -> None:
    """Make the old names in `MODULES` importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


def renamed_attributes(module: str, **names: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which finds attributes by their old names, with a warning.

    Args:
      module: Name of the module.
      **names: New name of each attribute, by its old name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name} is now {module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return find


def renamed_arguments(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function also take keyword arguments by their old names, with a warning.

    The signature and help text of the decorated function show the new names only.

    Args:
      **names: New name of each argument, by its old name.

    Raises:
      TypeError: A call gives an argument by both of its names.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(
                        f"{function.__name__}: '{old}' is the old name of '{new}'; pass only one"
                    )
                _warn(f"{function.__name__}: argument '{old}' is now '{new}'")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
