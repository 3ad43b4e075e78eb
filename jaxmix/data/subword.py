"""Sub-word tokenizers from vocabulary files: WordPiece (BERT) and byte-level BPE (GPT-2).

Encoding is done by the `tokenizers` library, in parallel over pieces of text that are cut where a
space follows something that is not a space. Neither recipe has a token that reaches across such a
place, so the ids are those of the text encoded whole.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.data.paths import expand_path
from jaxmix.data.tokenizers import StreamDecoder

try:
  import tokenizers
  from tokenizers import models, normalizers, pre_tokenizers
except ImportError as error:
  raise ImportError(
    "WordPiece and BPE need the package tokenizers, which is not installed — "
    'run: pip install "jaxmix[hf]"'
  ) from error

_CUT = re.compile(r"(?<=\S)\s")
_PIECE_CHARACTERS = 1 << 14


class _Subword:
  """What both recipes share: a library tokenizer, and the bytes that each id stands for."""

  def __init__(
    self,
    engine: tokenizers.Tokenizer,
    *,
    pieces: Sequence[bytes],
    end_id: int | None,
    fingerprint: dict[str, Any],
  ):
    self._engine = engine
    self._pieces = pieces
    self._end_id = end_id
    self._fingerprint = fingerprint

  @property
  def vocab_size(self) -> int:
    """The number of entries of the vocabulary."""
    return len(self._pieces)

  @property
  def end_id(self) -> int | None:
    """The id of `end_token`."""
    return self._end_id

  def encode(self, text: str) -> np.ndarray:
    """The ids of `text`, without special tokens: int32 [tokens]."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text: int32 [tokens]. Pieces of all texts are encoded in parallel."""
    cut = [list(_cut(text)) for text in texts]
    pieces = [piece for pieces in cut for piece in pieces]
    encoded = iter(self._engine.encode_batch_fast(pieces, add_special_tokens=False))
    return [
      np.concatenate([np.array(next(encoded).ids, np.int32) for _ in pieces]) for pieces in cut
    ]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; ids that stand for no text are dropped."""
    return self.decoder().text(ids)

  def decoder(self) -> StreamDecoder:
    """A fresh decoder for ids that arrive one by one."""
    return StreamDecoder(self._pieces)

  def fingerprint(self) -> dict[str, Any]:
    """The recipe and a hash of the vocabulary."""
    return dict(self._fingerprint)


class WordPiece(_Subword):
  """BERT's WordPiece: clean, lower-case, split at spaces and marks, then match the longest pieces.

  `[UNK]` in the text stays one token; every other special token in the text is ordinary text.
  Decoding puts a space before each word and each mark, as the vocabulary knows no spaces:
  "hello, world" comes back as "hello , world".

  Args:
    vocab_file: one piece a line; the line number is the id. `~` and `$NAME` are expanded.
    lowercase: lower-case and strip accents, as the uncased vocabularies want.
    end_token: the entry that ends a document; BERT has no other for it than "[SEP]".
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a WordPiece vocabulary, has an entry twice, or lacks a special token.
  Source: Devlin et al. 2018 (1810.04805); greedy matching as in Wu et al. 2016 (1609.08144).
  """

  _SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

  def __init__(
    self, vocab_file: str | os.PathLike, *, lowercase: bool = True, end_token: str = "[SEP]"
  ):
    path = expand_path(vocab_file)
    content = _read(path, 'a WordPiece vocabulary such as "vocab.txt"')
    entries = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    vocabulary = _numbered(path, entries)
    wanted = dict.fromkeys((*self._SPECIAL, end_token))
    missing = [token for token in wanted if token not in vocabulary]
    if missing:
      raise ValueError(
        f"{path} has {len(entries)} lines and lacks {', '.join(missing)} — expected a WordPiece "
        "vocabulary, one piece a line with BERT's special tokens — give such a vocab.txt; a "
        "vocab.json with merges belongs to BPE"
      )
    engine = tokenizers.Tokenizer(
      models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    engine.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.add_special_tokens(["[UNK]"])
    super().__init__(
      engine,
      pieces=[self._piece(entry, end_token) for entry in entries],
      end_id=vocabulary[end_token],
      fingerprint={
        "kind": "WordPiece",
        "vocabulary": _digest(content),
        "lowercase": lowercase,
        "end_token": end_token,
      },
    )

  def decoder(self) -> StreamDecoder:
    """A fresh decoder for ids that arrive one by one."""
    return StreamDecoder(self._pieces, skip_first_space=True)

  @classmethod
  def _piece(cls, entry: str, end_token: str) -> bytes:
    if entry == end_token or (entry in cls._SPECIAL and entry not in ("[UNK]", "[MASK]")):
      return b""
    joined = len(entry) > 2 and entry.startswith("##")
    return (entry[2:] if joined else " " + entry).encode()


class BPE(_Subword):
  """GPT-2's byte-level BPE: the bytes of each word, merged pair by pair in the order of a file.

  Every text encodes, and decodes to itself. `end_token` in the text is ordinary text.

  Args:
    vocab_file: JSON, entry to id. `~` and `$NAME` are expanded, also in merges_file.
    merges_file: one pair a line, the first merge first; a line "#version" may lead.
    end_token: the entry that ends a document.
  Raises:
    FileNotFoundError: there is no such file.
    ValueError: not such files, ids that are not 0, 1, 2, ..., a byte or `end_token` without an
      entry, or a merge of what the vocabulary does not have.
  Source: Radford et al. 2019, section 2.2; Sennrich et al. 2015 (1508.07909).
  """

  def __init__(
    self,
    vocab_file: str | os.PathLike,
    merges_file: str | os.PathLike,
    *,
    end_token: str = "<|endoftext|>",
  ):
    path, merges_path = expand_path(vocab_file), expand_path(merges_file)
    content = _read(path, 'a BPE vocabulary such as "vocab.json"')
    merges_content = _read(merges_path, 'a list of merges such as "merges.txt"')
    vocabulary = _entries(path, content)
    byte_of = _byte_of_character()
    missing = [entry for entry in (*byte_of, end_token) if entry not in vocabulary]
    if missing:
      raise ValueError(
        f"{path} lacks {len(missing)} entries: {', '.join(missing[:5])} — expected one for each of "
        f"the 256 bytes and {end_token!r} — give the vocabulary of a byte-level BPE, and name its "
        "own end by end_token="
      )
    engine = tokenizers.Tokenizer(
      models.BPE(vocabulary, _merges(merges_path, merges_content, vocabulary))
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    in_order = sorted(vocabulary, key=vocabulary.__getitem__)
    super().__init__(
      engine,
      pieces=[b"" if entry == end_token else _bytes(entry, byte_of) for entry in in_order],
      end_id=vocabulary[end_token],
      fingerprint={
        "kind": "BPE",
        "vocabulary": _digest(content),
        "merges": _digest(merges_content),
        "end_token": end_token,
      },
    )


def _cut(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _PIECE_CHARACTERS:
    place = _CUT.search(text, start + _PIECE_CHARACTERS)
    if not place:
      break
    yield text[start : place.start()]
    start = place.start()
  yield text[start:]


def _read(path: Path, expected: str) -> str:
  try:
    # Bytes, not text mode: an entry may hold characters that text mode takes for line ends.
    return path.read_bytes().decode("utf-8")
  except (FileNotFoundError, IsADirectoryError):
    raise FileNotFoundError(
      f"the vocabulary file {path} does not exist — expected {expected} — check the path"
    ) from None
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: byte {error.start} is not UTF-8 — expected {expected} — give the unpacked file"
    ) from None


def _numbered(path: Path, entries: list[str]) -> dict[str, int]:
  twice = [entry for entry, count in collections.Counter(entries).items() if count > 1]
  if twice:
    lines = [number for number, entry in enumerate(entries, 1) if entry == twice[0]]
    raise ValueError(
      f"{path} has {twice[0]!r} on lines {lines[0]} and {lines[1]} ({len(twice)} such entries) — "
      "expected each entry once, as the line number is the id — give a WordPiece vocabulary"
    )
  return {entry: number for number, entry in enumerate(entries)}


def _entries(path: Path, content: str) -> dict[str, int]:
  try:
    vocabulary = json.loads(content)
  except ValueError:
    vocabulary = None
  if not isinstance(vocabulary, dict) or not all(isinstance(i, int) for i in vocabulary.values()):
    raise ValueError(
      f"{path} is not a BPE vocabulary — expected JSON, entry to id — give GPT-2's vocab.json or "
      "one like it; a list of pieces belongs to WordPiece"
    )
  ids = sorted(vocabulary.values())
  if ids != list(range(len(ids))):
    wrong = next(want for want, have in enumerate(ids) if want != have)
    raise ValueError(
      f"{path} has {len(ids)} entries and id {wrong} is missing or given twice — expected ids 0 "
      f"to {len(ids) - 1}, each once — give the whole vocabulary"
    )
  return vocabulary


def _merges(path: Path, content: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
  merges = []
  for number, line in enumerate(content.split("\n"), 1):
    line = line.removesuffix("\r")
    if not line or (number == 1 and line.startswith("#version")):
      continue
    pair = line.split(" ")
    if len(pair) != 2:
      raise ValueError(
        f"{path}, line {number}: {line[:60]!r} — expected two entries with one space between — "
        "give the merges.txt of the vocabulary"
      )
    unknown = [entry for entry in (*pair, "".join(pair)) if entry not in vocabulary]
    if unknown:
      raise ValueError(
        f"{path}, line {number}: merges {pair[0]!r} and {pair[1]!r}, but the vocabulary of "
        f"{len(vocabulary)} entries has no {unknown[0]!r} — expected merges of this vocabulary — "
        "give both files of one tokenizer"
      )
    merges.append((pair[0], pair[1]))
  return merges


def _byte_of_character() -> dict[str, int]:
  """How GPT-2 spells bytes: printable Latin-1 as itself, the other 68 as U+0100 and on."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
  printable += range(ord("®"), ord("ÿ") + 1)
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {
    chr(256 + order): byte for order, byte in enumerate(others)
  }


def _bytes(entry: str, byte_of: dict[str, int]) -> bytes:
  if all(character in byte_of for character in entry):
    return bytes(byte_of[character] for character in entry)
  return entry.encode()  # an added token, spelt as itself


def _digest(content: str) -> str:
  return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
