"""Text from files: plain text and JSON lines, packed by gzip, xz or bzip2 or not at all.

`LocalFiles` takes the files of each split; `SplitFiles` takes one corpus and cuts it at given
bytes.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxmix.data.files import PACKED, PathOrPaths, as_list, content, find, sizes, unpacked
from jaxmix.data.sources import check_split, with_text

DocumentKind = Literal["file", "line", "paragraph"]

_JSON_LINES = (".jsonl", ".ndjson")
_DOCUMENT_KINDS = ("file", "line", "paragraph")


class _Reading:
  """How the bytes of files become documents; shared by both sources of this file."""

  def __init__(
    self,
    *,
    document: DocumentKind,
    text_field: str,
    encoding: str,
    replace: Mapping[str, str] | None,
  ):
    if document not in _DOCUMENT_KINDS:
      raise ValueError(
        f"document={document!r} is unknown — expected one of {', '.join(_DOCUMENT_KINDS)}"
      )
    if not isinstance(text_field, str):
      raise TypeError(f"text_field={text_field!r} — expected the name of a JSON field, a string")
    try:
      codecs.lookup(encoding)
    except (LookupError, TypeError):
      raise ValueError(
        f'encoding={encoding!r} is unknown — expected a name such as "utf-8" or "latin-1"'
      ) from None
    replace = {} if replace is None else replace
    if not isinstance(replace, Mapping) or not all(
      isinstance(text, str) and text and isinstance(replace[text], str) for text in replace
    ):
      raise TypeError(f'replace={replace!r} — expected text to text, e.g. {{"<unk>": "[UNK]"}}')
    self.document = document
    self.text_field = text_field
    self.encoding = encoding
    self.replace = dict(replace)

  def fingerprint(self) -> dict[str, Any]:
    return dict(vars(self))

  def documents(self, path: Path, chunks: Iterable[bytes], *, first: int) -> Iterator[str]:
    """The documents in `chunks`, the bytes of `path` from byte `first` on."""
    pieces = self._decoded(path, chunks, first)
    for text in self._cut(path, pieces):
      for old, new in self.replace.items():
        text = text.replace(old, new)
      yield text

  def _decoded(self, path: Path, chunks: Iterable[bytes], first: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(self.encoding)()
    read = first
    try:
      for chunk in chunks:
        read += len(chunk)
        yield decoder.decode(chunk)
      yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
      # The decoder counts within what it holds: the last chunk and what it had kept before.
      place = read - len(error.object) + error.start
      raise ValueError(
        f"{path}: byte {place} (0x{error.object[error.start]:02x}) does not decode as "
        f"{self.encoding} ({error.reason}) — expected text — give encoding= the file's own, e.g. "
        'encoding="latin-1"; a file cut at given bytes must be cut between characters'
      ) from None

  def _cut(self, path: Path, pieces: Iterator[str]) -> Iterator[str]:
    if _is_json_lines(path):
      return self._records(path, pieces)
    if self.document == "file":
      return iter(["".join(pieces)])
    return _lines(pieces) if self.document == "line" else _paragraphs(pieces)

  def _records(self, path: Path, pieces: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(_lines(pieces), 1):
      if not line or line.isspace():
        continue
      try:
        text = json.loads(line)[self.text_field]
        text.encode()  # JSON can spell half of a surrogate pair, which is no text
      except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
          f"{path}, line {number}: not a record with text in {self.text_field!r} "
          f"({type(error).__name__}: {error}): {line[:60]!r} — expected one JSON object a line, "
          f'{{"{self.text_field}": "..."}} — repair the line, or name its field by text_field='
        ) from None
      yield text


class LocalFiles:
  """Documents in local files, each split from files of its own.

  Args:
    train, validation, test: a file, a glob ("corpus/**/*.txt"), a folder (all files in it, at any
      depth, but hidden ones), or a list of these. `~` and `$NAME` are expanded; a relative path
      starts at the working directory. Files named .gz, .xz, .bz2 are unpacked as they are read;
      .jsonl and .ndjson hold one record a line, and a record is a document; every other file is
      text.
    document: what one document of a text file is: "file"; "line", without its line end; or
      "paragraph", the lines between blank lines.
    text_field: the field of a JSON record that holds its text.
    encoding: of the files; "utf-8-sig" also drops a byte order mark.
    replace: literal replacements in the text, done before tokenising: {"<unk>": "[UNK]"} for
      WikiText.
  Raises, when the text is first asked for:
    FileNotFoundError: nothing is there.
    ValueError: a variable in a path is not set; bytes that do not decode (file and byte); a bad
      JSON line (file and line); a split without text; a split that does not exist.
  """

  def __init__(
    self,
    train: PathOrPaths | None = None,
    validation: PathOrPaths | None = None,
    test: PathOrPaths | None = None,
    *,
    document: DocumentKind = "file",
    text_field: str = "text",
    encoding: str = "utf-8",
    replace: Mapping[str, str] | None = None,
  ):
    named = {"train": train, "validation": validation, "test": test}
    self._paths = {
      split: as_list(split, paths) for split, paths in named.items() if paths is not None
    }
    if not self._paths:
      raise ValueError(
        'LocalFiles was given no files — expected at least one split, e.g. train="corpus/*.txt"'
      )
    self._reading = _Reading(
      document=document, text_field=text_field, encoding=encoding, replace=replace
    )

  @property
  def splits(self) -> tuple[str, ...]:
    """The splits that were given files."""
    return tuple(self._paths)

  def documents(self, split: str) -> Iterator[str]:
    """The documents of `split`, file after file; within a glob or a folder by name."""
    texts = (
      text
      for path in self._files(split)
      for text in self._reading.documents(path, unpacked(path), first=0)
    )
    yield from with_text(texts, where=f"split {split!r} ({', '.join(self._paths[split])})")

  def fingerprint(self, split: str) -> dict[str, Any]:
    """How the files are read, and their names, size and content."""
    return {"kind": "LocalFiles", **self._reading.fingerprint(), **content(self._files(split))}

  def shards(self, split: str) -> list[tuple[str, LocalFiles]]:
    """Each file that is not empty, as a source of its own."""
    files = [file for file in self._files(split) if file.stat().st_size]
    reading = self._reading.fingerprint()
    return [(str(file), LocalFiles(**{split: file}, **reading)) for file in files]

  def manifest(self, split: str) -> dict[str, Any]:
    """How the files are read, and their names and sizes."""
    return {"kind": "LocalFiles", **self._reading.fingerprint(), **sizes(self._files(split))}

  def _files(self, split: str) -> list[Path]:
    check_split(self, split)
    return find(self._paths[split])


class SplitFiles:
  """One corpus cut by position: train, then validation, then test.

  The files, unpacked and one after the other, are a row of bytes: train is [0, validation_start),
  validation is [validation_start, test_start), test is the rest. Without `test_start` there is no
  test split and validation is the rest. Tiny Shakespeare's 90/5/5 is `SplitFiles("input.txt",
  validation_start=1003854, test_start=1059624)`. A document that lies on a cut is cut in two.

  Args:
    files, document, encoding, replace: as in `LocalFiles`; JSON lines cannot be cut at a byte.
    validation_start, test_start: positions in bytes of the unpacked files.
  Raises: as `LocalFiles`; ValueError: the cuts are not in order, or fall inside a character.
  """

  def __init__(
    self,
    files: PathOrPaths,
    *,
    validation_start: int,
    test_start: int | None = None,
    document: DocumentKind = "file",
    encoding: str = "utf-8",
    replace: Mapping[str, str] | None = None,
  ):
    self._paths = as_list("files", files)
    cuts = [validation_start] if test_start is None else [validation_start, test_start]
    if not all(isinstance(cut, int) and not isinstance(cut, bool) for cut in cuts):
      raise TypeError(
        f"validation_start={validation_start!r}, test_start={test_start!r} — expected whole "
        "numbers of bytes"
      )
    if not all(low < high for low, high in itertools.pairwise([0, *cuts])):
      raise ValueError(
        f"validation_start={validation_start}, test_start={test_start} — expected "
        "0 < validation_start < test_start — swap or move the cuts"
      )
    bounds = [0, *cuts, None]
    names = ("train", "validation", "test")
    self._ranges = dict(zip(names, itertools.pairwise(bounds), strict=False))
    self._reading = _Reading(
      document=document, text_field="text", encoding=encoding, replace=replace
    )

  @property
  def splits(self) -> tuple[str, ...]:
    """("train", "validation"), and "test" where `test_start` is given."""
    return tuple(self._ranges)

  def documents(self, split: str) -> Iterator[str]:
    """The documents of `split` in the order of the corpus."""
    check_split(self, split)
    start, stop = self._ranges[split]
    where = f"split {split!r}, bytes {start} to {'the end' if stop is None else stop} of "
    yield from with_text(self._in_range(start, stop), where=where + ", ".join(self._paths))

  def fingerprint(self, split: str) -> dict[str, Any]:
    """How the files are read, the range of bytes, and the files' names, size and content."""
    check_split(self, split)
    start, stop = self._ranges[split]
    return {
      "kind": "SplitFiles",
      "start": start,
      "stop": stop,
      **self._reading.fingerprint(),
      **content(find(self._paths)),
    }

  def _in_range(self, start: int, stop: int | None) -> Iterator[str]:
    passed = 0  # bytes of the files before this one
    for path in find(self._paths):
      if _is_json_lines(path):
        raise ValueError(
          f"{path} holds JSON lines, which cannot be cut at a byte — expected text — write one "
          "file a split and use LocalFiles"
        )
      if stop is not None and passed >= stop:
        return
      low = max(0, start - passed)
      high = None if stop is None else stop - passed
      size = 0
      kept = []  # a split of one corpus is held in memory: cuts are for small corpora
      for chunk in unpacked(path):
        begin, end = low - size, len(chunk) if high is None else high - size
        kept.append(chunk[max(0, begin) : max(0, end)])
        size += len(chunk)
      passed += size
      if any(kept):
        yield from self._reading.documents(path, kept, first=low)


def _is_json_lines(path: Path) -> bool:
  return (path.with_suffix("") if path.suffix in PACKED else path).suffix in _JSON_LINES


def _lines(pieces: Iterable[str]) -> Iterator[str]:
  """Lines without their ends. str.splitlines would cut at more than line feeds, e.g. at U+2028."""
  held = ""
  for piece in pieces:
    *lines, held = (held + piece).split("\n")
    for line in lines:
      yield line.removesuffix("\r")
  yield held


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
  paragraph: list[str] = []
  for line in _lines(pieces):
    if line and not line.isspace():
      paragraph.append(line)
    elif paragraph:
      yield "\n".join(paragraph)
      paragraph = []
  yield "\n".join(paragraph)
