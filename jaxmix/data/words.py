"""Words as ids: the word-level protocol of language modelling."""

from __future__ import annotations

import collections
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxmix.data.files import PathOrPaths, as_list, find, unpacked
from jaxmix.data.tokenizers import StreamDecoder


class Words:
  """Whatever stands between spaces is a word, and `<eos>` ends each line, an empty one too.

  The vocabulary is that of the files, the commonest word first, and `<eos>`. A word outside it is
  `<unk>`, which has to be in the files then. Lines come back with their words one space apart.

  Args:
    files: the texts whose words make the vocabulary, those that are trained on: a path, a glob, a
      folder or a list of these; `~` and `$NAME` are expanded, .gz, .xz and .bz2 are unpacked.
  Raises, when a vocabulary is first needed:
    FileNotFoundError: nothing is there.
    ValueError: a text has a word that is not in the files, which have no `<unk>` either.
  Source: as WikiText has been read since Merity et al. 2016 (arXiv 1609.07843).
  """

  def __init__(self, files: PathOrPaths):
    self._paths = as_list("files", files)

  @functools.cached_property
  def _words(self) -> list[str]:
    counts = collections.Counter()
    for path in find(self._paths):
      text = b"".join(unpacked(path)).decode("utf-8")
      counts.update(word for line in _lines(text) for word in line)
    return [word for word, _ in counts.most_common()]

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {word: index for index, word in enumerate(self._words)}

  @property
  def vocab_size(self) -> int:
    """The number of different words, `<eos>` among them."""
    return len(self._words)

  @property
  def end_id(self) -> None:
    """None: lines end with `<eos>`, documents with nothing more."""
    return None

  def encode(self, text: str) -> np.ndarray:
    """The ids of the words and line ends of `text`: int32 [tokens]."""
    unknown = self._ids.get("<unk>")
    words = [word for line in _lines(text) for word in line]
    ids = [self._ids.get(word, unknown) for word in words]
    if unknown is None and None in ids:
      raise ValueError(
        f"the word {words[ids.index(None)]!r} is not in the vocabulary, and neither is <unk> — "
        "expected words of the files that made it — add the text to these files"
      )
    return np.array(ids, np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Words with spaces before them, and line ends."""
    return self.decoder().text(ids)

  def decoder(self) -> StreamDecoder:
    """A fresh decoder for ids that arrive one by one."""
    return StreamDecoder([b"\n" if x == "<eos>" else f" {x}".encode() for x in self._words])

  def fingerprint(self) -> dict[str, Any]:
    """A hash of the vocabulary."""
    digest = hashlib.blake2b("\n".join(self._words).encode(), digest_size=16).hexdigest()
    return {"kind": "Words", "digest": digest}


def _lines(text: str) -> Iterable[list[str]]:
  """The words of each line, and `<eos>`."""
  for line in io.StringIO(text):
    words = line.split()
    yield [*words, "<eos>"] if line.endswith("\n") else words
