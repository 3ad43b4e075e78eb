"""WordPiece and BPE: golden counts, round trips, and files that do not match."""

from __future__ import annotations

import json
import lzma

import numpy as np
import pytest

from jaxmix.data import BPE, WordPiece
from jaxmix.data import subword as subword_file

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def wordpiece(shared):
  return WordPiece(shared / "data" / "vocab" / "bert-base-uncased" / "vocab.txt")


@pytest.fixture(scope="module")
def bpe(shared):
  folder = shared / "data" / "vocab" / "gpt2"
  return BPE(folder / "vocab.json", folder / "merges.txt")


def wikitext(shared, name):
  return lzma.open(shared / "data" / "wikitext-2" / f"{name}.txt.xz").read().decode("utf-8")


@pytest.mark.parametrize(
  "name, count, unknown, first",
  [("valid.raw", 238_656, 107, [1027, 7570, 7849, 2271]), ("test.raw", 273_178, 30, None)],
)
def test_wordpiece_gives_the_golden_ids_of_wikitext(shared, wordpiece, name, count, unknown, first):
  ids = wordpiece.encode(wikitext(shared, name))
  assert (len(ids), int((ids == 100).sum())) == (count, unknown)
  assert ids[:4].tolist() == (first or [1027, 2728, 8945, 11314])


def test_bpe_gives_the_golden_ids_of_wikitext(shared, bpe):
  texts = [wikitext(shared, "valid.raw"), wikitext(shared, "test.raw")]
  validation, test = bpe.encode_batch(texts)
  assert (len(validation), len(test)) == (249_887, 286_221)
  assert validation[:4].tolist() == [220, 198, 796, 8074] and validation.dtype == np.int32
  assert bpe.decode(validation) == texts[0]


def test_unk_in_the_text_is_one_token(shared, wordpiece):
  text = wikitext(shared, "valid.tokens")
  ids = wordpiece.encode(text.replace("<unk>", "[UNK]"))
  assert int((ids == 100).sum()) >= text.count("<unk>") > 5_000
  assert wordpiece.encode("a [UNK] b").tolist() == [1037, 100, 1038]
  assert len(wordpiece.encode("a <unk> b")) > 3


@pytest.mark.parametrize("name", ["wordpiece", "bpe"])
def test_cutting_the_text_for_speed_does_not_change_the_ids(request, shared, monkeypatch, name):
  tokenizer = request.getfixturevalue(name)
  text = wikitext(shared, "valid.raw")[:60_000] + " \n \n\n  x   \t y\u00a0\u2003z\r\n" * 500
  monkeypatch.setattr(subword_file, "_PIECE_CHARACTERS", 10**9)
  whole = tokenizer.encode(text)
  for size in (1, 7, 1000):
    monkeypatch.setattr(subword_file, "_PIECE_CHARACTERS", size)
    np.testing.assert_array_equal(tokenizer.encode(text), whole)


@pytest.mark.parametrize("name", ["wordpiece", "bpe"])
def test_text_cannot_spell_the_end_of_a_document(request, name):
  tokenizer = request.getfixturevalue(name)
  for text in ("[SEP]", "<|endoftext|>", "x [SEP] <|endoftext|> y"):
    assert tokenizer.end_id not in tokenizer.encode(text)
  assert tokenizer.decode([tokenizer.end_id]) == ""


def test_bpe_decodes_every_text_and_never_half_a_character(bpe):
  text = " leading,  two spaces\n\tünïcödé 漢字 🙂 <|endoftext|>"
  ids = bpe.encode(text)
  decoder = bpe.decoder()
  pushed = [decoder.push(value) for value in ids]
  assert "".join(pushed) + decoder.flush() == bpe.decode(ids) == text
  assert not any("\ufffd" in piece for piece in pushed)
  assert bpe.encode("").shape == (0,)


def test_wordpiece_decodes_to_words_with_spaces_between(wordpiece):
  ids = wordpiece.encode("Hello, wörld: unaffable [UNK]!")
  decoder = wordpiece.decoder()
  pushed = [decoder.push(value) for value in ids]
  assert "".join(pushed) == wordpiece.decode(ids) == "hello , world : unaffable [UNK] !"
  assert wordpiece.decode([0, 101, *ids, wordpiece.end_id]) == wordpiece.decode(ids)


def test_fingerprints_follow_vocabulary_and_settings(shared, wordpiece, bpe):
  path = shared / "data" / "vocab" / "bert-base-uncased" / "vocab.txt"
  assert WordPiece(path).fingerprint() == wordpiece.fingerprint() != bpe.fingerprint()
  assert WordPiece(path, lowercase=False).fingerprint() != wordpiece.fingerprint()
  assert json.loads(json.dumps(bpe.fingerprint())) == bpe.fingerprint()
  assert (wordpiece.vocab_size, wordpiece.end_id) == (30_522, 102)
  assert (bpe.vocab_size, bpe.end_id) == (50_257, 50_256)


@pytest.mark.parametrize(
  "entries, text",
  [
    ([*SPECIAL[:3], "a", "##b"], r"lacks \[SEP\], \[MASK\] — expected a WordPiece vocabulary"),
    ([*SPECIAL, "a", "##b", "a"], "'a' on lines 6 and 8"),
    (['{"a": 0}'], r"lacks \[PAD\].* belongs to BPE"),
  ],
)
def test_a_wordpiece_vocabulary_that_does_not_match_is_an_error(tmp_path, entries, text):
  (tmp_path / "vocab.txt").write_text("\n".join(entries) + "\n")
  with pytest.raises(ValueError, match=text):
    WordPiece(tmp_path / "vocab.txt")


def gpt2_like():
  """A vocabulary of bytes, one merged pair and the end."""
  entries = [*subword_file._byte_of_character(), "ab", "<|endoftext|>"]
  return {entry: number for number, entry in enumerate(entries)}


@pytest.mark.parametrize(
  "change, merges, text",
  [
    (lambda v: v, "#version: 0.2\na b\nb c\n", "line 3: merges 'b' and 'c', .* has no 'bc'"),
    (lambda v: v, "a b c\n", "line 1: 'a b c' — expected two entries"),
    (lambda v: v.pop("<|endoftext|>") and v, "a b\n", r"lacks 1 entries: <\|endoftext\|>"),
    (lambda v: v | {"ab": 999}, "a b\n", "258 entries and id 256 is missing"),
    (lambda v: {"a": 0, "b": 1}, "", "lacks 255 entries"),
    (lambda v: list(v), "", "is not a BPE vocabulary — expected JSON, entry to id"),
  ],
)
def test_bpe_files_that_do_not_match_are_errors(tmp_path, change, merges, text):
  (tmp_path / "vocab.json").write_text(json.dumps(change(gpt2_like())))
  (tmp_path / "merges.txt").write_text(merges)
  with pytest.raises(ValueError, match=text):
    BPE(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_files_of_the_other_recipe_are_errors(shared):
  folder = shared / "data" / "vocab"
  with pytest.raises(ValueError, match=r"lacks .* belongs to BPE"):
    WordPiece(folder / "gpt2" / "vocab.json")
  with pytest.raises(ValueError, match=r"is not a BPE vocabulary .* belongs to WordPiece"):
    BPE(folder / "bert-base-uncased" / "vocab.txt", folder / "gpt2" / "merges.txt")


def test_missing_vocabulary_files_are_named(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match=r"vocabulary file .*absent\.txt does not exist"):
    WordPiece(tmp_path / "absent.txt")
  monkeypatch.delenv("VOCABULARIES", raising=False)
  with pytest.raises(ValueError, match="environment variable VOCABULARIES, which is not set"):
    BPE("$VOCABULARIES/vocab.json", "$VOCABULARIES/merges.txt")
  (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="byte 0 is not UTF-8"):
    WordPiece(tmp_path / "binary.txt")
