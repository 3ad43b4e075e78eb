"""Files by name: what a path, a glob or a folder means, unpacked as it is read, told apart by
content."""

from __future__ import annotations

import bz2
import functools
import glob
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmix.data.paths import expand_variables

PathOrPaths = str | os.PathLike | Sequence[str | os.PathLike]

PACKED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_CHUNK_BYTES = 1 << 20


def as_list(name: str, paths: Any) -> list[str]:
  """What the argument `name` was given, as a list of paths; checked, not yet looked for."""
  items = [paths] if isinstance(paths, str | os.PathLike) else paths
  if not isinstance(items, Sequence) or not all(isinstance(p, str | os.PathLike) for p in items):
    raise TypeError(
      f"{name}={paths!r} of type {type(paths).__name__} — expected a path, a glob, a folder or a "
      "list of these"
    )
  if not items:
    raise ValueError(f"{name}={paths!r} names no file — expected at least one path — give one")
  return [os.fspath(item) for item in items]


def find(paths: list[str]) -> list[Path]:
  """The files that `paths` name, in that order; within a glob or a folder by name."""
  return [file for path in paths for file in _find_one(path)]


def _find_one(given: str) -> list[Path]:
  path = Path(expand_variables(given))
  if path.is_file():
    return [path]
  if path.is_dir():
    found = [
      file
      for file in sorted(path.rglob("*"))
      if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    nothing = "is a folder without files"
  elif glob.has_magic(str(path)):
    matches = sorted(glob.glob(str(path), recursive=True))
    found = [file for file in map(Path, matches) if file.is_file()]
    nothing = "is a glob that matches no file"
  else:
    found, nothing = [], "does not exist"
  if not found:
    raise FileNotFoundError(
      f"{path} {nothing} (working directory {Path.cwd()}) — expected a file, a glob or a "
      "folder of them — check the path"
    )
  return found


def unpacked(path: Path) -> Iterator[bytes]:
  """The bytes of a file in chunks, without the packing that its name ends with."""
  opener = PACKED.get(path.suffix, open)
  try:
    with opener(path, "rb") as file:
      while chunk := file.read(_CHUNK_BYTES):
        yield chunk
  except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
    raise _damaged(path, error) from None
  except OSError as error:
    if error.errno is not None:
      raise
    raise _damaged(path, error) from None  # bz2 reports damage as an OSError without a number


def _damaged(path: Path, error: Exception) -> ValueError:
  return ValueError(
    f"{path} does not unpack ({type(error).__name__}: {error}) — expected a whole {path.suffix} "
    "file — fetch it again, or rename it if it is not packed"
  )


def sizes(files: Sequence[Path]) -> dict[str, Any]:
  """How many files, their size and a hash of names and sizes; reads none of them."""
  listed = [(file.name, file.stat().st_size) for file in files]
  digest = hashlib.blake2b(repr(listed).encode(), digest_size=16).hexdigest()
  return {"files": len(files), "bytes": sum(size for _, size in listed), "digest": digest}


def content(files: Sequence[Path]) -> dict[str, Any]:
  """How many files, their size and a hash of names and bytes: part of a source's fingerprint."""
  digest, size = hashlib.blake2b(digest_size=16), 0
  for file in files:
    status = file.stat()
    size += status.st_size
    digest.update(f"{file.name}\0{_digest(file, status.st_size, status.st_mtime_ns)}\0".encode())
  return {"files": len(files), "bytes": size, "digest": digest.hexdigest()}


@functools.cache
def _digest(file: Path, size: int, modified: int) -> str:
  """The hash of a file, once a process; size and time are arguments so that a change is seen."""
  with open(file, "rb") as handle:
    return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
