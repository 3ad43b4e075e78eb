"""Where text comes from: the protocol of a source, and the source that every machine has."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol


class Source(Protocol):
  """Documents of text in named splits.

  splits: the names of the splits, e.g. ("train", "validation", "test").
  documents(split): the documents, strings that are not blank, in an order that never changes.
  fingerprint(split): a JSON-able dict that changes when what `documents(split)` yields changes.
  """

  @property
  def splits(self) -> tuple[str, ...]: ...

  def documents(self, split: str) -> Iterator[str]: ...

  def fingerprint(self, split: str) -> dict[str, Any]: ...


class ShardedSource(Source, Protocol):
  """A source whose documents stand in shards, such as files, that can be read apart.

  shards(split): the name of each shard and a source of its documents, which has this split; one
    after the other they are `documents(split)`.
  manifest(split): a JSON-able dict that changes when a shard is added, removed, renamed or changes
    its size. Unlike a fingerprint, it is made without reading the shards.
  """

  def shards(self, split: str) -> Sequence[tuple[str, Source]]: ...

  def manifest(self, split: str) -> dict[str, Any]: ...


def check_split(source: Source, split: str) -> None:
  """Raises ValueError, listing the splits that exist, where `source` has no split of that name."""
  if split not in source.splits:
    raise ValueError(
      f"{type(source).__name__} has no split {split!r} — it has {', '.join(source.splits)} — "
      "name one of these, or give the source this split"
    )


def with_text(documents: Iterable[str], *, where: str) -> Iterator[str]:
  """The documents that are not blank. Raises ValueError naming `where` when there is none."""
  empty = True
  for document in documents:
    if document and not document.isspace():
      empty = False
      yield document
  if empty:
    raise ValueError(
      f"{where} holds no text — expected at least one document that is not blank — "
      "check the paths and what one document is"
    )


class StandardLibrary:
  """The source text of Python's own standard library: real text that every machine has.

  A document is one `.py` file in UTF-8. Tests, installed packages and files written for this one
  build of Python are left out. A file belongs to a split by the hash of its path: about 90 % train,
  5 % validation, 5 % test, the same files on every machine. The text itself differs between
  versions of Python, so figures are comparable within one version; the fingerprint names it.
  """

  splits = ("train", "validation", "test")

  def documents(self, split: str) -> Iterator[str]:
    """The files of `split` as text, in the order of their paths."""
    check_split(self, split)
    texts = (text for _, text in _library_files(split))
    yield from with_text(texts, where=f"the standard library in {sysconfig.get_path('stdlib')}")

  def fingerprint(self, split: str) -> dict[str, Any]:
    """The version of Python, and the number, size and content of the files."""
    check_split(self, split)
    return {
      "kind": "StandardLibrary",
      "python": platform.python_version(),
      **_library_content(split),
    }


_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def _library_files(split: str) -> Iterator[tuple[str, str]]:
  folder = Path(sysconfig.get_path("stdlib"))
  for name in _library_names(folder):
    if _split_of(name) != split:
      continue
    try:
      yield name, (folder / name).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
      continue  # a few files are in another encoding on purpose


def _library_names(folder: Path) -> list[str]:
  names = []
  for parent, folders, files in os.walk(folder):
    # Not entered at all: installed packages can be a hundred times the size of the library.
    folders[:] = [name for name in folders if name not in _LEFT_OUT and _for_any_build(name)]
    found = (Path(parent, name) for name in files if name.endswith(".py") and _for_any_build(name))
    names += [path.relative_to(folder).as_posix() for path in found]
  return sorted(names)


def _for_any_build(name: str) -> bool:
  return not name.startswith(("_sysconfigdata", "config-"))


def _split_of(name: str) -> str:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  percent = int.from_bytes(digest, "big") % 100
  return "train" if percent < 90 else "validation" if percent < 95 else "test"


@functools.cache
def _library_content(split: str) -> dict[str, Any]:
  digest, files, size = hashlib.blake2b(digest_size=16), 0, 0
  for name, text in _library_files(split):
    content = text.encode()
    digest.update(f"{name}\0{len(content)}\0".encode())
    digest.update(content)
    files, size = files + 1, size + len(content)
  return {"files": files, "bytes": size, "digest": digest.hexdigest()}
