"""Places on disk: paths with variables, the cache folder, and a lock among processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_variables(text: str | os.PathLike) -> str:
  """`text` with a leading `~` and `$NAME` / `${NAME}` replaced from the environment.

  Raises:
    TypeError: not a path.   ValueError: a variable is not set, or the path is empty.
  """
  if not isinstance(text, str | os.PathLike):
    raise TypeError(
      f"a path is {text!r} of type {type(text).__name__} — expected a string or a Path — put the "
      "path in quotes"
    )
  text = os.fspath(text)
  if not text:
    raise ValueError('a path is "" — expected the name of a file or a folder — give one')
  for match in _VARIABLE.finditer(text):
    variable = match.group(1) or match.group(2)
    if variable not in os.environ:
      raise ValueError(
        f"the path {text!r} uses the environment variable {variable}, which is not set — "
        f"set it, e.g. export {variable}=/path/to/the/folder"
      )
  return os.path.expanduser(os.path.expandvars(text))


def expand_path(path: str | os.PathLike) -> Path:
  """`expand_variables` as a Path; a relative path is relative to the working directory."""
  return Path(expand_variables(path))


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
  """`cache_dir`, else $XDG_CACHE_HOME/jaxmix, else ~/.cache/jaxmix: what can be computed again."""
  if cache_dir is not None:
    return expand_path(cache_dir)
  return Path(os.environ.get("XDG_CACHE_HOME") or expand_path("~/.cache")) / "jaxmix"


@contextlib.contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
  """Holds `lock_file` against every other process and thread; waits for its turn.

  The kernel drops the lock with the process, so a killed holder blocks nobody.
  """
  with open(lock_file, "a") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
