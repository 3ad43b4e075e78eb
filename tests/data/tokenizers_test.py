"""Bytes as ids, and decoding as ids arrive."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmix.data import ByteTokenizer

TEXT = "plain, ünïcödé, 漢字 and 🙂\n"


def test_bytes_decode_to_the_text_they_encode():
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and bytes(ids.tolist()) == TEXT.encode()
  assert tokenizer.decode(ids) == TEXT
  assert [one.tolist() for one in tokenizer.encode_batch(["a", "", "bc"])] == [[97], [], [98, 99]]
  assert tokenizer.vocab_size == 257


def test_the_end_of_a_document_is_no_text():
  tokenizer = ByteTokenizer()
  assert tokenizer.end_id == 256
  assert tokenizer.decode([104, 105, tokenizer.end_id, 33]) == "hi!"


def test_any_bytes_decode_the_same_at_once_and_one_by_one():
  tokenizer = ByteTokenizer()
  random = np.random.default_rng(0)
  for _ in range(200):
    ids = random.integers(0, 257, 20)
    decoder = tokenizer.decoder()
    pushed = "".join(decoder.push(value) for value in ids) + decoder.flush()
    content = bytes(ids[ids < 256].tolist())
    assert pushed == tokenizer.decode(ids) == content.decode("utf-8", errors="replace")


def test_a_decoder_never_gives_half_a_character():
  decoder = ByteTokenizer().decoder()
  assert [decoder.push(value) for value in "a🙂".encode()] == ["a", "", "", "", "🙂"]
  assert decoder.push("é".encode()[0]) == "" and decoder.flush() == "\ufffd"


@pytest.mark.parametrize("value", [-1, 257])
def test_an_id_outside_the_vocabulary_is_an_error(value):
  with pytest.raises(ValueError, match=f"id {value} is outside the vocabulary of 257"):
    ByteTokenizer().decode([value])
