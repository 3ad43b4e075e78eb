"""Sentences, or two at a time, and their labels from tables of text: the tasks of GLUE and their
kin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmix.data.checks import check_integer
from jaxmix.data.files import PathOrPaths
from jaxmix.data.packing import Row
from jaxmix.data.text_tables import TextTables, lines
from jaxmix.data.tokenizers import Tokenizer


class LabelledText(TextTables):
  """Rows of ids in the form of BERT: start, text, end, and another text with its end.

  A row has `tokens`, `token_types` (1 in the second text), `segment_ids` (1, and 0 behind the end)
  [length] int32, and `label` int32. Quotes in a table mean nothing.

  Args:
    train, validation, test: files of a split, as in `SentencePairs`.
    tokenizer: how text becomes ids; its id 0 has to stand for no text, as [PAD] of WordPiece.
    length: ids of a row; of two texts the longer is cut first.
    text, label: columns of the tables: names in their first line, or numbers from 0 where they have
      none.   second: that of the second text; None means that there is none.
    labels: the label of class 0, of class 1, and so on.
    start_id, end_id: what begins a row and ends a text; [CLS] and [SEP] of BERT's vocabulary.
  Raises, when a split is first used:
    FileNotFoundError: nothing is there.
    ValueError: a line without these columns, an unknown label, a text without any token (file and
      line each); a split without lines.
  Source: Devlin et al. 2018 (arXiv 1810.04805), section 3; Wang et al. 2018 (arXiv 1804.07461).
  """

  def __init__(
    self,
    train: PathOrPaths | None = None,
    validation: PathOrPaths | None = None,
    test: PathOrPaths | None = None,
    *,
    tokenizer: Tokenizer,
    length: int,
    text: str | int,
    label: str | int,
    second: str | int | None = None,
    labels: Sequence[str] = ("0", "1"),
    start_id: int = 101,
    end_id: int = 102,
  ):
    splits = {"train": train, "validation": validation, "test": test}
    super().__init__(splits, tokenizer=tokenizer, length=length, labels=labels)
    self._columns = [text, label] if second is None else [text, label, second]
    # A row begins, and each text has a token and its end.
    check_integer("length", length, minimum=1 + 2 * (len(self._columns) - 1))
    if len({type(column) for column in self._columns}) > 1:
      raise ValueError(
        f"LabelledText: columns {self._columns}, expected all by name or all by number; a table "
        "has a header or it has none"
      )
    self._start, self._end = start_id, end_id

  def fingerprint(self, split: str):
    """That of the tables, the columns and the ids around texts."""
    around = {"columns": self._columns, "start": self._start, "end": self._end}
    return super().fingerprint(split) | around

  def _rows_of(self, files: list[Path]) -> TextRows:
    found = [line for path in files for line in self._read(path)]
    places = [place for _, place in found]
    labels = [self._class(fields[1], place) for fields, place in found]
    texts = [self._encoded([fields[0] for fields, _ in found], places)]
    if len(self._columns) == 3:
      texts.append(self._encoded([fields[2] for fields, _ in found], places))
    return TextRows([self._row(*each) for each in zip(*texts, strict=True)], labels)

  def _read(self, path: Path) -> Iterator[tuple[list[str], str]]:
    """The columns that were asked for, of each line, and its place."""
    columns = self._columns
    for number, (fields, place) in enumerate(lines(path)):
      if number == 0 and isinstance(columns[0], str):
        missing = [column for column in columns if column not in fields]
        if missing:
          raise ValueError(
            f"{place}: the columns are {', '.join(fields)} — expected {', '.join(missing)} among "
            "them — name columns of this table, or give numbers where it has no header"
          )
        columns = [fields.index(column) for column in columns]
        continue
      if len(fields) <= max(columns):
        raise ValueError(
          f"{place}: {len(fields)} columns: {chr(9).join(fields)[:60]!r} — expected at least "
          f"{max(columns) + 1}, with tabs between — repair the line, or give other columns"
        )
      yield [fields[column].strip() for column in columns], place

  def _row(self, *texts: np.ndarray) -> Row:
    texts = [list(text) for text in texts]
    while sum(map(len, texts)) > self._length - 1 - len(texts):
      max(texts, key=len).pop()
    tokens, types = [self._start], [0]
    for kind, text in enumerate(texts):
      tokens += [*text, self._end]
      types += [kind] * (len(text) + 1)
    rows = np.zeros((3, self._length), np.int32)
    rows[:, : len(tokens)] = tokens, types, np.ones(len(tokens))
    return dict(zip(("tokens", "token_types", "segment_ids"), rows, strict=True))


class TextRows:
  """Rows of a `LabelledText` by index."""

  def __init__(self, rows: list[Row], labels: list[int]):
    self._rows, self._labels = rows, np.array(labels, np.int32)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    return {**self._rows[index], "label": self._labels[index]}
