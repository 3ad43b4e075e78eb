"""The one error of a wrong run file, and the nearest right name to put into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
  """A run file or an override is wrong; `str` is one line with the place and the repair."""


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
  """The end of an error message: "; did you mean heads?", or `otherwise` where no name is near."""
  close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.6)
  if close:
    # Paths are alike by their folders alone: what is much farther than the nearest is no help.
    ratios = [difflib.SequenceMatcher(None, other, name).ratio() for other in close]
    close = [other for other, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.1]
    return f"; did you mean {' or '.join(close)}?"
  return f"; {otherwise}" if otherwise else ""
