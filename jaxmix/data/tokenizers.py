"""Text to ids and back: the protocol of a tokenizer, decoding as ids arrive, and bytes as ids."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
  """Text to ids and back.

  vocab_size: ids lie in [0, vocab_size).
  end_id: the id that ends a document, None where there is none. Text never encodes to it.
  encode(text): ids, int32 [tokens], without special tokens.
  encode_batch(texts): the same for each text.
  decode(ids): text. Ids that stand for no text, end_id among them, are dropped.
  decoder(): a `StreamDecoder`, for text that appears as its ids arrive.
  fingerprint(): a JSON-able dict that changes when what `encode` returns changes.
  """

  @property
  def vocab_size(self) -> int: ...

  @property
  def end_id(self) -> int | None: ...

  def encode(self, text: str) -> np.ndarray: ...

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

  def decode(self, ids: Iterable[int]) -> str: ...

  def decoder(self) -> StreamDecoder: ...

  def fingerprint(self) -> dict[str, Any]: ...


class StreamDecoder:
  """Text from ids that arrive one by one, never half a character.

  `"".join(decoder.push(id) for id in ids) + decoder.flush()` is `tokenizer.decode(ids)`. Bytes that
  are not UTF-8 become U+FFFD. To print what follows a prompt, push the prompt's ids first: whether
  a space comes before a word depends on what went before.

  Args:
    pieces: the bytes of each id; b"" for an id that stands for no text.
    skip_first_space: whether text starts without the space that begins a piece.
  """

  def __init__(self, pieces: Sequence[bytes], *, skip_first_space: bool = False):
    self._pieces = pieces
    self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._skip_space = skip_first_space

  def push(self, token_id: int) -> str:
    """The characters that `token_id` completes, often none or several.

    Raises ValueError where the id is outside the vocabulary.
    """
    token_id = int(token_id)
    if not 0 <= token_id < len(self._pieces):
      raise ValueError(
        f"id {token_id} is outside the vocabulary of {len(self._pieces)} — expected ids of this "
        "tokenizer — use the tokenizer that the model was trained with"
      )
    piece = self._pieces[token_id]
    if self._skip_space and piece:
      piece, self._skip_space = piece.removeprefix(b" "), False
    return self._utf8.decode(piece)

  def flush(self) -> str:
    """What is left when no more ids come: U+FFFD for a character that was never completed."""
    return self._utf8.decode(b"", final=True)

  def text(self, ids: Iterable[int]) -> str:
    """All of `ids` at once: what `push` and `flush` would return, joined."""
    return "".join(self.push(token_id) for token_id in ids) + self.flush()


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255; 256 ends a document. Every text decodes to itself again."""

  vocab_size = 257
  end_id = 256

  _PIECES = (*(bytes([value]) for value in range(256)), b"")

  def encode(self, text: str) -> np.ndarray:
    """The UTF-8 bytes of `text`: int32 [bytes]."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and id 256 is dropped."""
    return self.decoder().text(ids)

  def decoder(self) -> StreamDecoder:
    """A fresh decoder for ids that arrive one by one."""
    return StreamDecoder(self._PIECES)

  def fingerprint(self) -> dict[str, Any]:
    """{"kind": "ByteTokenizer"}: there is nothing to vary."""
    return {"kind": "ByteTokenizer"}
