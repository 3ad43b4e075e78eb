"""Pairs of sentences and their labels from tables of text, as natural language inference has them.

Such a table, of SNLI (Bowman et al. 2015, arXiv 1508.05326) and its kin, has a line a pair and tabs
between its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmix.data.files import PathOrPaths
from jaxmix.data.packing import Row
from jaxmix.data.text_tables import TextTables, lines
from jaxmix.data.tokenizers import Tokenizer

_COLUMNS = {
  "label": ("label", "gold_label"),
  "premise": ("premise", "sentence1"),
  "hypothesis": ("hypothesis", "sentence2"),
}


class Pair(NamedTuple):
  """One line of a table; place: the file and the line."""

  label: str
  premise: str
  hypothesis: str
  place: str


class SentencePairs(TextTables):
  """Pairs of sentences as ids: `premise` and `hypothesis` [length] int32, 0 behind their ends.

  A table without a header has the columns label, premise, hypothesis. With a header, columns may
  come in any order and among others, are also known as gold_label, sentence1, sentence2, and fields
  may be in quotes. Splits are held in memory.

  Args:
    train, validation, test: files of a split: a path, a glob, a folder or a list of these; `~` and
      `$NAME` are expanded, and .gz, .xz, .bz2 are unpacked.
    tokenizer: how a sentence becomes ids; its id 0 has to stand for no text, as [PAD] of WordPiece.
    length: tokens of a sentence; a longer one is cut.
    labels: the label of class 0, of class 1, and so on.
  Raises, when a split is first used:
    FileNotFoundError: nothing is there.
    ValueError: a line without the three columns, an unknown label, a sentence without any token
      (file and line each); a split without pairs.
  """

  def __init__(
    self,
    train: PathOrPaths | None = None,
    validation: PathOrPaths | None = None,
    test: PathOrPaths | None = None,
    *,
    tokenizer: Tokenizer,
    length: int,
    labels: Sequence[str] = ("entailment", "neutral", "contradiction"),
  ):
    splits = {"train": train, "validation": validation, "test": test}
    super().__init__(splits, tokenizer=tokenizer, length=length, labels=labels)

  def _rows_of(self, files: list[Path]) -> PairRows:
    pairs = [pair for path in files for pair in _pairs(path)]
    labels = np.array([self._class(pair.label, pair.place) for pair in pairs], np.int32)
    premises = self._padded([pair.premise for pair in pairs], pairs)
    hypotheses = self._padded([pair.hypothesis for pair in pairs], pairs)
    return PairRows(premises, hypotheses, labels)

  def _padded(self, sentences: list[str], pairs: list[Pair]) -> np.ndarray:
    """[N, length] int32, 0 behind the end of each sentence."""
    ids = np.zeros((len(sentences), self._length), np.int32)
    for row, tokens in enumerate(self._encoded(sentences, [pair.place for pair in pairs])):
      tokens = tokens[: self._length]
      ids[row, : len(tokens)] = tokens
    return ids


class PairRows:
  """`premise`, `hypothesis` [length] int32 and `label` int32 by index."""

  def __init__(self, premises: np.ndarray, hypotheses: np.ndarray, labels: np.ndarray):
    self._premises, self._hypotheses, self._labels = premises, hypotheses, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Row:
    return {
      "premise": self._premises[index],
      "hypothesis": self._hypotheses[index],
      "label": self._labels[index],
    }


def _pairs(path: Path) -> Iterator[Pair]:
  """The lines of a table as pairs."""
  columns, header, width = [0, 1, 2], False, 3
  for number, (fields, place) in enumerate(lines(path)):
    if number == 0 and (found := _columns(fields)) is not None:
      columns, header, width = found, True, len(fields)
      continue
    if len(fields) != width:
      expected = "those of the header" if header else "label, premise, hypothesis"
      raise ValueError(
        f"{place}: {len(fields)} columns: {chr(9).join(fields)[:60]!r} — expected {width}, "
        f"{expected}, with tabs between — repair the line, or name the columns in a first line"
      )
    if header:
      fields = [_unquoted(field) for field in fields]
    yield Pair(*(fields[column].strip() for column in columns), place=place)


def _columns(fields: list[str]) -> list[int] | None:
  """Where a header has label, premise and hypothesis; None where this line is none."""
  names = [field.strip().lower() for field in fields]
  found = [
    next((names.index(name) for name in known if name in names), None)
    for known in _COLUMNS.values()
  ]
  return None if None in found else found


def _unquoted(field: str) -> str:
  """A field that was put into quotes, its own quotes doubled, without them."""
  inner = field[1:-1]
  if len(field) < 2 or field[0] != '"' or field[-1] != '"' or '"' in inner.replace('""', ""):
    return field
  return inner.replace('""', '"')
