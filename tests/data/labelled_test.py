"""Labelled examples: images and pairs of sentences read as their files have them, and batches of
them shuffled, shared and resumed like those of text."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import struct

import numpy as np
import pytest

from jaxmix.data import (
  BPE,
  ByteTokenizer,
  IDXImages,
  LabelledDataset,
  LocalFiles,
  SentencePairs,
  TextDataset,
  WordPiece,
)

NAMES = ("original", "revised_combined")
PAIRS = [
  ("entailment", "Two dogs run .", "Animals run ."),
  ("contradiction", 'A man says " hello " .', "Nobody speaks ."),
  ("neutral", "A child", "A child with a very long name indeed"),
]


def idx(array) -> bytes:
  array = np.asarray(array, np.uint8)
  header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
  return header + array.tobytes()


@pytest.fixture
def digits(tmp_path):
  """A folder of 20 + 6 images of 3 x 2 pixels, image n all n; the test files are not packed."""
  for stem, count in (("train", 20), ("t10k", 6)):
    images = np.arange(count)[:, None, None] + np.zeros((3, 2))
    for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count) % 4)):
      name = f"{stem}-{kind}-ubyte"
      if stem == "train":
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
      else:
        (tmp_path / name).write_bytes(idx(array))
  return tmp_path


def images(folder, **settings) -> LabelledDataset:
  settings = {"classes": 4, "validation_examples": 5, **settings}
  return LabelledDataset(IDXImages(folder, **settings))


def take(batches, count):
  return list(itertools.islice(batches, count))


def first_pixels(batches):
  return [round(float(pixel) * 255) for batch in batches for pixel in batch["image"][:, 0, 0]]


def test_images_are_those_of_the_files_and_the_last_ones_are_held_out(digits):
  data = images(digits)
  assert [data.targets(split) for split in ("train", "validation", "test")] == [15, 5, 6]
  outline = data.outline
  assert outline.sizes == {"image_shape": (3, 2), "classes": 4}
  assert (outline.length, outline.unit, outline.units_per_row) == (6, "examples", 1)
  for split, expected in (("train", range(15)), ("validation", range(15, 20)), ("test", range(6))):
    batches = list(data.epoch(split, batch_size=4))
    for batch in batches:
      assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == outline.row
    weights = np.concatenate([batch["weights"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])[weights > 0]
    assert weights.sum() == len(expected)
    assert first_pixels(batches)[: len(expected)] == list(expected)
    assert labels.tolist() == [number % 4 for number in expected]
  assert data.bytes_per_target("train") is None


def test_mnist_is_read(shared):
  data = LabelledDataset(IDXImages(shared / "data" / "mnist"))
  assert [data.targets(split) for split in ("train", "validation", "test")] == [
    55_000,
    5_000,
    10_000,
  ]
  batch = next(data.epoch("test", batch_size=10_000))
  assert batch["image"].shape == (10_000, 28, 28)
  assert (batch["image"].min(), batch["image"].max()) == (0, 1)
  assert batch["label"][:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
  # Counts of the ten digits in the test set, as the distribution has them.
  counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
  assert np.bincount(batch["label"]).tolist() == counts


def test_batches_resume_and_are_shared_like_those_of_text(digits):
  def labels(batches, count):
    return [tuple(first_pixels([batch])) for batch in take(batches, count)]

  settings = {"batch_size": 6, "seed": 3}
  whole = labels(images(digits).batches("train", **settings), 12)
  assert sorted(number for batch in whole[:5] for number in batch) == sorted([*range(15)] * 2)
  begun = images(digits).batches("train", **settings)
  take(begun, 4)
  state = json.loads(json.dumps(begun.get_state()))
  resumed = images(digits).batches("train", **settings)
  resumed.set_state(state)
  assert labels(resumed, 8) == whole[4:]
  for index in range(2):
    part = images(digits).batches("train", **settings, shard=(index, 2))
    assert labels(part, 12) == [batch[3 * index : 3 * index + 3] for batch in whole]
  other = images(digits, validation_examples=4).batches("train", **settings)
  with pytest.raises(ValueError, match=r"source.validation_examples was 5, is 4"):
    other.set_state(state)
  with pytest.raises(ValueError, match=r"split 'train' has 15 examples, fewer than batch_size=16"):
    images(digits).batches("train", batch_size=16, seed=0)


@pytest.mark.parametrize(
  ("spoil", "settings", "error", "text"),
  [
    (
      lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(),
      {},
      FileNotFoundError,
      "has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz — expected the four files",
    ),
    (
      lambda folder: (folder / "t10k-images-idx3-ubyte").write_bytes(b"\x89PNG"),
      {},
      ValueError,
      "begins with 89504e47 — expected an IDX file of bytes in 3 dimensions, which begins with "
      "00000803",
    ),
    (
      lambda folder: (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((6, 3, 2)))[:-1]),
      {},
      ValueError,
      "holds 35 bytes behind its header — expected 36 for 6 x 3 x 2 — fetch it again",
    ),
    (
      lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(5))),
      {},
      ValueError,
      "t10k-images-idx3-ubyte has 6 images and .* 5 labels — expected one label an image",
    ),
    (
      lambda folder: None,
      {"classes": 3},
      ValueError,
      r"has the label 3 at image 3 — expected 0 to 2 — set IDXImages.classes=4",
    ),
  ],
)
def test_what_is_wrong_with_image_files_is_said(digits, spoil, settings, error, text):
  spoil(digits)
  with pytest.raises(error, match=text):
    list(images(digits, **settings).epoch("test", batch_size=4))


def test_held_out_images_leave_some_to_train_on(digits):
  with pytest.raises(ValueError, match="validation_examples=20 of the 20 training images"):
    images(digits, validation_examples=20).targets("train")
  with pytest.raises(ValueError, match="IDXImages has no split 'dev' — it has train, validation"):
    images(digits).targets("dev")


@pytest.fixture
def tables(tmp_path):
  """The same pairs without a header, packed, and with one: columns in another order, quotes."""
  plain = "".join("\t".join(pair) + "\n" for pair in PAIRS)
  (tmp_path / "plain.tsv.xz").write_bytes(lzma.compress(plain.encode()))
  lines = ["id\tsentence1\tsentence2\tgold_label"]
  for number, (label, premise, hypothesis) in enumerate(PAIRS):
    quoted = '"' + premise.replace('"', '""') + '"' if '"' in premise else premise
    lines.append(f"{number}\t{quoted}\t{hypothesis}\t{label}")
  (tmp_path / "named.tsv").write_text("\r\n".join(lines))
  return tmp_path


def pairs(folder, **settings) -> LabelledDataset:
  settings = {"tokenizer": ByteTokenizer(), "length": 24, **settings}
  source = SentencePairs(folder / "plain.tsv.xz", folder / "named.tsv", **settings)
  return LabelledDataset(source)


def test_both_layouts_of_a_table_give_the_same_pairs(tables):
  data = pairs(tables)
  assert data.outline.sizes == {"vocab_size": 257, "classes": 3}
  plain, named = (next(data.epoch(split, batch_size=3)) for split in ("train", "validation"))
  assert {name: (x.shape[1:], x.dtype) for name, x in plain.items()} == data.outline.row
  for name in plain:
    np.testing.assert_array_equal(plain[name], named[name])
  assert plain["label"].tolist() == [0, 2, 1]
  for row, (_, premise, hypothesis) in enumerate(PAIRS):
    for name, sentence in (("premise", premise), ("hypothesis", hypothesis)):
      expected = sentence.encode()[:24]
      assert plain[name][row].tolist() == [*expected, *[0] * (24 - len(expected))]


def test_snli_is_read(shared):
  folder = shared / "data"
  tokenizer = WordPiece(folder / "vocab" / "bert-base-uncased" / "vocab.txt")
  source = SentencePairs(
    [folder / "snli" / "counterfactual" / f"{name}.train.tsv" for name in NAMES],
    folder / "snli" / "dev.tsv.xz",
    tokenizer=tokenizer,
    length=32,
  )
  data = LabelledDataset(source)
  assert (data.targets("train"), data.targets("validation")) == (8_330, 9_842)
  batch = next(data.epoch("validation", batch_size=9_842))
  assert np.bincount(batch["label"]).tolist() == [3_329, 3_235, 3_278]
  first = "two women are embracing while holding to go packages ."
  assert tokenizer.decode(batch["premise"][0]) == first
  rows = next(data.epoch("train", batch_size=8_330))["premise"]
  sentence = 'a person in blue with the word " france " on her back is shooting a bow and arrow'
  assert any(tokenizer.decode(row).startswith(sentence) for row in rows)


def test_another_table_or_tokenizer_is_refused_on_resuming(tables):
  state = pairs(tables).batches("train", batch_size=2, seed=0).get_state()
  with pytest.raises(ValueError, match=r"source.length was 24, is 23") as caught:
    pairs(tables, length=23, labels=("entailment", "contradiction", "neutral")).batches(
      "train", batch_size=2, seed=0
    ).set_state(state)
  assert "source.labels was" in str(caught.value)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("-\ta\tb\n", r"t.tsv, line 1: the label '-' is unknown — expected one of entailment, neutral"),
    ("neutral\ta\tb\nneutral\ta b\n", r"t.tsv, line 2: 2 columns: 'neutral\\ta b' — expected 3, l"),
    ("neutral\ta\tb\n\nneutral\ta\t\n", r"t.tsv, line 3: the sentence '' has no tokens"),
    ("gold_label\tsentence1\tsentence2\n", r"split 'train' \(.*t.tsv\) holds no examples"),
    ("label\tpremise\thypothesis\tx\na\tb\tc\n", r"line 2: 3 columns: .* those of the header"),
    ("neutral\t\udcff\tb\n", r"t.tsv: byte 8 is not UTF-8"),
  ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, text, message):
  (tmp_path / "t.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
  source = SentencePairs(tmp_path / "t.tsv", tokenizer=ByteTokenizer(), length=8)
  with pytest.raises(ValueError, match=message):
    LabelledDataset(source).targets("train")


def test_arguments_that_cannot_be_are_refused(tables, shared):
  with pytest.raises(ValueError, match="SentencePairs was given no files"):
    SentencePairs(tokenizer=ByteTokenizer(), length=8)
  with pytest.raises(ValueError, match=r"labels=\('a', 'a'\) — expected two or more, each once"):
    pairs(tables, labels=("a", "a"))
  with pytest.raises(TypeError, match=r"tokenizer=3 of type int — expected a Tokenizer such as"):
    pairs(tables, tokenizer=3)
  folder = shared / "data" / "vocab" / "gpt2"
  with pytest.raises(ValueError, match="the tokenizer's id 0 stands for '!' — expected one that"):
    pairs(tables, tokenizer=BPE(folder / "vocab.json", folder / "merges.txt"))
  with pytest.raises(TypeError, match=r"expected a LabelledSource such as IDXImages\(...\)"):
    LabelledDataset(LocalFiles("text.txt"))


@pytest.mark.parametrize("packing", ["documents", "blocks", "none"])
def test_text_says_what_its_rows_are(tmp_path, packing):
  (tmp_path / "text.txt").write_text("some text of forty letters and more " * 3)
  data = TextDataset(
    LocalFiles(tmp_path / "text.txt"),
    ByteTokenizer(),
    length=120,
    packing=packing,
    cache_dir=tmp_path / ".cache",
  )
  batch = next(data.epoch("train", batch_size=2))
  assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == data.outline.row
  assert (data.outline.sizes, data.outline.units_per_row) == ({"vocab_size": 257}, 120)
