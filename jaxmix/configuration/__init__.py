"""Run files: gin, read strictly. `load` gives a `Configuration`, which calls the root function."""

from __future__ import annotations

from jaxmix.configuration.configuration import Configuration, load
from jaxmix.configuration.errors import ConfigurationError

__all__ = ["Configuration", "ConfigurationError", "load"]
