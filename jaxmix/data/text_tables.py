"""What sources of labelled text share: tables of lines with tabs between columns, as files of
splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.data.checks import check_integer, check_protocol
from jaxmix.data.files import PathOrPaths, as_list, content, find, unpacked
from jaxmix.data.packing import Rows
from jaxmix.data.sources import check_split
from jaxmix.data.tokenizers import Tokenizer


class TextTables:
  """The base of sources of labelled text; a subclass makes the rows of files (`_rows_of`).

  Args:
    splits: split -> its files, None where it has none.
    tokenizer: how text becomes ids; its id 0 has to stand for no text, as [PAD] of WordPiece.
    length: ids of a text.
    labels: the label of class 0, of class 1, and so on.
  """

  def __init__(
    self,
    splits: Mapping[str, PathOrPaths | None],
    *,
    tokenizer: Tokenizer,
    length: int,
    labels: Sequence[str],
  ):
    name = type(self).__name__
    self._paths = {
      split: as_list(split, paths) for split, paths in splits.items() if paths is not None
    }
    if not self._paths:
      raise ValueError(
        f'{name} was given no files — expected at least one split, e.g. train="train.tsv"'
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
    self._rows: dict[str, Rows] = {}

  def _rows_of(self, files: list[Path]) -> Rows:
    raise NotImplementedError

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
    """The most ids of one text."""
    return self._length

  def rows(self, split: str) -> Rows:
    """The examples of a split, file after file."""
    check_split(self, split)
    if split not in self._rows:
      rows = self._rows_of(find(self._paths[split]))
      if not len(rows):
        raise ValueError(
          f"split {split!r} ({', '.join(self._paths[split])}) holds no examples — expected at "
          "least one line — check the paths"
        )
      self._rows[split] = rows
    return self._rows[split]

  def fingerprint(self, split: str) -> dict[str, Any]:
    """The labels, the length, the tokenizer, and the names, size and content of the files."""
    check_split(self, split)
    return {
      "kind": type(self).__name__,
      "labels": list(self.labels),
      "length": self._length,
      "tokenizer": self.tokenizer.fingerprint(),
      **content(find(self._paths[split])),
    }

  def _class(self, label: str, place: str) -> int:
    """The number of a label; place: the file and the line."""
    if label not in self.labels:
      raise ValueError(
        f"{place}: the label {label!r} is unknown — expected one of {', '.join(self.labels)} — "
        f"drop the line, or name it in {type(self).__name__}.labels"
      )
    return self.labels.index(label)

  def _encoded(self, texts: list[str], places: list[str]) -> list[np.ndarray]:
    """The ids of each text, at least one."""
    encoded = self.tokenizer.encode_batch(texts)
    for text, ids, place in zip(texts, encoded, places, strict=True):
      if not len(ids):
        raise ValueError(
          f"{place}: the sentence {text!r} has no tokens — expected text — drop the line or repair "
          "it"
        )
    return encoded


def lines(path: Path) -> Iterator[tuple[list[str], str]]:
  """The columns of each line that is not blank, and its place: the file and the number."""
  try:
    text = b"".join(unpacked(path)).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: byte {error.start} is not UTF-8 — expected a table of text — convert the file"
    ) from None
  for number, line in enumerate(text.split("\n"), 1):
    if line and not line.isspace():
      yield line.removesuffix("\r").split("\t"), f"{path}, line {number}"
