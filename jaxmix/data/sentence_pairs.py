"""Pairs of sentences and their labels from tables of text, as natural language inference has them.

Such a table, of SNLI (Bowman et al. 2015, arXiv 1508.05326) and its kin, has a line a pair and tabs
between its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmix.data.checks import check_integer, check_protocol
from jaxmix.data.files import PathOrPaths, as_list, content, find, unpacked
from jaxmix.data.packing import Row
from jaxmix.data.sources import check_split
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


class SentencePairs:
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
    named = {"train": train, "validation": validation, "test": test}
    self._paths = {
      split: as_list(split, paths) for split, paths in named.items() if paths is not None
    }
    if not self._paths:
      raise ValueError(
        'SentencePairs was given no files — expected at least one split, e.g. train="train.tsv"'
      )
    check_protocol("tokenizer", tokenizer, Tokenizer, example="WordPiece")
    check_integer("length", length, minimum=1)
    if tokenizer.decode([0]).strip("\0"):
      raise ValueError(
        f"the tokenizer's id 0 stands for {tokenizer.decode([0])!r} — expected one that stands for "
        "no text, since 0 fills up a row — use WordPiece, or ByteTokenizer"
      )
    if len(set(labels)) != len(labels) or len(labels) < 2:
      raise ValueError(
        f"labels={labels!r} — expected two or more, each once — list what the tables have"
      )
    self.tokenizer = tokenizer
    self.labels = tuple(labels)
    self._length = int(length)
    self._rows: dict[str, PairRows] = {}

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that were given files."""
    return tuple(self._paths)

  @property
  def sizes(self) -> Mapping[str, Any]:
    """vocab_size and classes."""
    return {"vocab_size": self.tokenizer.vocab_size, "classes": len(self.labels)}

  @property
  def length(self) -> int:
    """The most tokens of one sentence."""
    return self._length

  def rows(self, split: str) -> PairRows:
    """The pairs of a split, file after file."""
    check_split(self, split)
    if split not in self._rows:
      pairs = [pair for path in find(self._paths[split]) for pair in _pairs(path)]
      if not pairs:
        raise ValueError(
          f"split {split!r} ({', '.join(self._paths[split])}) holds no pairs — expected at least "
          "one line — check the paths"
        )
      labels = np.array([self._label(pair) for pair in pairs], np.int32)
      premises = self._encoded([pair.premise for pair in pairs], pairs)
      hypotheses = self._encoded([pair.hypothesis for pair in pairs], pairs)
      self._rows[split] = PairRows(premises, hypotheses, labels)
    return self._rows[split]

  def fingerprint(self, split: str) -> dict[str, Any]:
    """The labels, the length, the tokenizer, and the names, size and content of the files."""
    check_split(self, split)
    return {
      "kind": "SentencePairs",
      "labels": list(self.labels),
      "length": self._length,
      "tokenizer": self.tokenizer.fingerprint(),
      **content(find(self._paths[split])),
    }

  def _label(self, pair: Pair) -> int:
    if pair.label not in self.labels:
      raise ValueError(
        f"{pair.place}: the label {pair.label!r} is unknown — expected one of "
        f"{', '.join(self.labels)} — drop the line, or name it in SentencePairs.labels"
      )
    return self.labels.index(pair.label)

  def _encoded(self, sentences: list[str], pairs: list[Pair]) -> np.ndarray:
    """[N, length] int32, 0 behind the end of each sentence."""
    ids = np.zeros((len(sentences), self._length), np.int32)
    for row, (tokens, pair) in enumerate(
      zip(self.tokenizer.encode_batch(sentences), pairs, strict=True)
    ):
      if not len(tokens):
        raise ValueError(
          f"{pair.place}: the sentence {sentences[row]!r} has no tokens — expected text — drop the "
          "line or repair it"
        )
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
  try:
    text = b"".join(unpacked(path)).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: byte {error.start} is not UTF-8 — expected a table of text — convert the file"
    ) from None
  places, header, width = [0, 1, 2], False, 3
  for number, line in enumerate(text.split("\n"), 1):
    fields = line.removesuffix("\r").split("\t")
    if number == 1 and (found := _columns(fields)) is not None:
      places, header, width = found, True, len(fields)
      continue
    if not line or line.isspace():
      continue
    if len(fields) != width:
      columns = "those of the header" if header else "label, premise, hypothesis"
      raise ValueError(
        f"{path}, line {number}: {len(fields)} columns: {line[:60]!r} — expected {width}, "
        f"{columns}, with tabs between — repair the line, or name the columns in a first line"
      )
    if header:
      fields = [_unquoted(field) for field in fields]
    yield Pair(*(fields[place].strip() for place in places), place=f"{path}, line {number}")


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
