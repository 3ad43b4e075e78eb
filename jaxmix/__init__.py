"""jaxmix: sub-quadratic sequence mixers for JAX.

`import jaxmix` is light: the packages below are imported when they are first named, and gin, TFDS,
Grain and Orbax only by the few files that use them.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PACKAGES = (
  "configuration",
  "data",
  "evaluation",
  "inference",
  "layers",
  "mixers",
  "models",
  "objectives",
  "ops",
  "sharding",
  "training",
)


def __getattr__(name: str):
  if name in _PACKAGES:
    return importlib.import_module(f"jaxmix.{name}")
  raise AttributeError(f"module 'jaxmix' has no attribute {name!r}; it has {', '.join(_PACKAGES)}")


def __dir__():
  return [*globals(), *_PACKAGES]
