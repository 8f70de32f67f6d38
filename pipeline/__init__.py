"""How it flows: configuration, plan, layers, detection, mosaic, products; the only package that imports the others.

    from slidecube.pipeline import load_config, plan, run, open_inventory

The four names are resolved when they are first used, so that `slidecube --version` does not wait for xarray.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slidecube.pipeline.config import load_config as load_config
    from slidecube.pipeline.open import open_inventory as open_inventory
    from slidecube.pipeline.plan import plan as plan
    from slidecube.pipeline.run import run as run

_FACE = {
    "load_config": "slidecube.pipeline.config",
    "open_inventory": "slidecube.pipeline.open",
    "plan": "slidecube.pipeline.plan",
    "run": "slidecube.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FACE])


class _Face(ModuleType):
    """The package's module, in which `plan` and `run` are the functions, not the submodules of the same name.

    Importing a submodule binds it on its package, which would hide the function, or not, by the order of imports.
    The modules themselves are reached by `from slidecube.pipeline.run import ...` or `importlib.import_module`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FACE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
