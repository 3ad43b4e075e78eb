"""Words as ids: counts of WikiText-2, and what happens to words that are not in the vocabulary."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from jaxmix.data import Words


def test_published_counts(shared):
  """The vocabulary of WikiText-2 and the tokens of its splits, as everybody counts them."""
  folder = shared / "data" / "wikitext-2"
  words = Words(folder / "train.tokens.txt.xz")
  assert words.vocab_size == 33_278
  for split, tokens, types in (("valid", 217_646, 13_777), ("test", 245_569, 14_143)):
    with lzma.open(folder / f"{split}.tokens.txt.xz", "rt", encoding="utf-8") as file:
      ids = words.encode(file.read())
    assert (len(ids), len(np.unique(ids)), ids.dtype) == (tokens, types, np.int32)


def test_text_and_back(tmp_path):
  (tmp_path / "a.txt").write_text(" a rose is\n\n a <unk> rose\n")
  words = Words(tmp_path / "a.txt")
  assert words.vocab_size == 5 and words.end_id is None
  assert words.decode(words.encode("a rose\n\nis thorny\n")) == " a rose\n\n is <unk>\n"
  assert words.decode(words.encode("a  rose")) == " a rose"  # a line that goes on
  assert words.fingerprint() == Words([tmp_path / "a.txt"]).fingerprint()
  (tmp_path / "a.txt").write_text("a rose is\n")
  assert words.fingerprint() != Words(tmp_path / "a.txt").fingerprint()


def test_unknown_word(tmp_path):
  (tmp_path / "a.txt").write_text("a rose\n")
  with pytest.raises(ValueError) as error:
    Words(tmp_path / "a.txt").encode("a thorn\n")
  assert str(error.value) == (
    "the word 'thorn' is not in the vocabulary, and neither is <unk> — expected words of the files "
    "that made it — add the text to these files"
  )
