"""A split tokenised once: ids in a memory-mapped file, with where each document begins.

A store is a folder `<cache>/tokens/<key>/` of three files: tokens.bin, offsets.bin, store.json. The
key is a hash of the source's and the tokenizer's fingerprints, so another text or vocabulary is
another store. A store is written under a lock in `<key>.partial/` and then renamed: there is a
whole store or none.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxmix.data.paths import cache_folder, exclusive
from jaxmix.data.sources import Source
from jaxmix.data.tokenizers import Tokenizer

Separator = Literal["end", "none"]

_FORMAT = 1  # of the files; another number makes other keys
_BATCH_CHARACTERS = 1 << 22  # of text tokenised at a time: bounds memory, and keeps all cores busy
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """The tokens of one split.

  tokens: [N] uint16 or int32, the documents one after the other, memory-mapped and read-only.
  offsets: [documents + 1] int64; document d is tokens[offsets[d] : offsets[d + 1]].
  text_bytes: the length of all documents in UTF-8.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  text_bytes: int

  @property
  def documents(self) -> int:
    """The number of documents."""
    return len(self.offsets) - 1


def open_token_store(
  source: Source,
  split: str,
  tokenizer: Tokenizer,
  *,
  separator: Separator = "end",
  cache_dir: str | os.PathLike | None = None,
) -> TokenStore:
  """The tokens of a split: opened where they are cached, else computed and cached.

  Several processes may ask at once: one computes, the others wait and open. A cached store whose
  files do not have the size they should is computed again.

  Args:
    separator: "end": each document is followed by the tokenizer's end_id, if it has one; "none": by
      nothing.
    cache_dir: where stores are kept; None is $XDG_CACHE_HOME/jaxmix or ~/.cache/jaxmix.
  Raises:
    OSError: the cache folder is full or cannot be written.
    ValueError: what the source raises, or a split without tokens.
  """
  if separator not in ("end", "none"):
    raise ValueError(f"separator={separator!r} is unknown — expected one of end, none")
  end_id = tokenizer.end_id if separator == "end" else None
  description = {
    "format": _FORMAT,
    "split": split,
    "source": source.fingerprint(split),
    "tokenizer": tokenizer.fingerprint(),
    "end_id": end_id,
  }
  key = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16)
  folder = cache_folder(cache_dir) / "tokens" / key.hexdigest()
  try:
    if store := _opened(folder):
      return store
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_suffix(".lock")):
      store = _opened(folder)  # another process may have written it while this one waited
      if not store:
        _write(folder, source.documents(split), tokenizer, end_id=end_id, description=description)
        store = _opened(folder)
  except OSError as error:
    if error.errno in _NO_SPACE + _NO_ACCESS and _concerns(error, folder.parent):
      raise _cache_error(folder.parent, error) from error
    raise
  return store


def _opened(folder: Path) -> TokenStore | None:
  try:
    sizes = json.loads((folder / "store.json").read_text())
    dtype = np.dtype(sizes["dtype"])
    expected = {
      "tokens.bin": sizes["tokens"] * dtype.itemsize,
      "offsets.bin": (sizes["documents"] + 1) * 8,
    }
    whole = all((folder / name).stat().st_size == size for name, size in expected.items())
  except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
    return None
  if not whole:
    return None
  # Plain views: slicing an np.memmap costs several times as much as slicing an array.
  tokens = np.memmap(folder / "tokens.bin", dtype, mode="r").view(np.ndarray)
  offsets = np.memmap(folder / "offsets.bin", np.int64, mode="r").view(np.ndarray)
  return TokenStore(tokens=tokens, offsets=offsets, text_bytes=sizes["text_bytes"])


def _write(
  folder: Path,
  documents: Iterator[str],
  tokenizer: Tokenizer,
  *,
  end_id: int | None,
  description: dict[str, Any],
) -> None:
  partial = folder.with_suffix(".partial")
  shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
  partial.mkdir()
  try:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    lengths: list[int] = []
    text_bytes = 0
    with _Output(partial / "tokens.bin") as file:
      for texts in _batched(documents):
        text_bytes += sum(len(text.encode("utf-8")) for text in texts)
        for ids in tokenizer.encode_batch(texts):
          file.write(ids.astype(dtype).tobytes())
          if end_id is not None:
            file.write(dtype.type(end_id).tobytes())
          lengths.append(len(ids) + (end_id is not None))
    if not sum(lengths):
      raise ValueError(
        f"split {description['split']!r} has {len(lengths)} documents and no token — expected text "
        "that the tokenizer knows — check the source and the vocabulary"
      )
    with _Output(partial / "offsets.bin") as file:
      file.write(np.cumsum([0, *lengths], dtype=np.int64).tobytes())
    sizes = {"tokens": sum(lengths), "documents": len(lengths), "dtype": dtype.name}
    with _Output(partial / "store.json") as file:
      content = {**sizes, "text_bytes": text_bytes, "made_from": description}
      file.write(json.dumps(content, indent=1).encode())
    shutil.rmtree(folder, ignore_errors=True)  # a damaged store
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


class _Output:
  """A file that is on the disk when it is closed, and whose errors carry its name."""

  def __init__(self, path: Path):
    self._path = path

  def __enter__(self):
    self._file = open(self._path, "wb")
    return self

  def write(self, content: bytes) -> None:
    try:
      self._file.write(content)
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._path)) from error

  def __exit__(self, kind, value, traceback) -> None:
    try:
      if kind is None:
        self._file.flush()
        os.fsync(self._file.fileno())
      self._file.close()
    except OSError as error:
      if kind is None:
        raise OSError(error.errno, error.strerror, str(self._path)) from error


def _batched(documents: Iterator[str]) -> Iterator[list[str]]:
  batch: list[str] = []
  characters = 0
  for document in documents:
    batch.append(document)
    characters += len(document)
    if characters >= _BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def _concerns(error: OSError, folder: Path) -> bool:
  return error.filename is not None and (
    Path(error.filename).is_relative_to(folder) or folder.is_relative_to(error.filename)
  )


def _cache_error(folder: Path, error: OSError) -> OSError:
  if error.errno in _NO_SPACE:
    room = shutil.disk_usage(folder).free
    state = f"has no room for the tokens, {room:,} bytes are free"
    wanted = "about two bytes a token"
  else:
    state, wanted = "cannot be written", "a folder that this user may write"
  return OSError(
    error.errno,
    f"the token cache {folder} {state}: {error.strerror} — expected {wanted} — make room, or put "
    "it elsewhere by cache_dir= or XDG_CACHE_HOME",
  )
