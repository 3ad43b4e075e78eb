"""Batches: shuffled by seed, shared by hosts, resumed exactly, refused for other data."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset, WordPiece

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  lines = [f"line {number} of the corpus" + "!" * (number % 23) for number in range(400)]
  (folder / "train.txt").write_text("\n".join(lines[:300]))
  (folder / "valid.txt").write_text("\n".join(lines[300:]))
  return folder


@pytest.fixture(scope="module")
def dataset(corpus):
  return make(corpus)


def make(corpus, **changes):
  settings = {"length": LENGTH, "cache_dir": corpus / "cache", **changes}
  source = LocalFiles(train=corpus / "train.txt", validation=corpus / "valid.txt", document="line")
  return TextDataset(source, ByteTokenizer(), **settings)


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(one, other):
  assert len(one) == len(other)
  for left, right in zip(one, other, strict=True):
    assert set(left) == set(right)
    for key in left:
      np.testing.assert_array_equal(left[key], right[key])


def names(batches):
  """Each row by its content, in order."""
  return [row.tobytes() for batch in batches for row in batch["inputs"]]


def rows_in(dataset, split="train"):
  return len(dataset._rows(split, "training"))


@pytest.mark.parametrize("packing", ["documents", "blocks"])
def test_a_batch_has_the_shapes_and_dtypes_that_are_promised(corpus, packing):
  batch = next(make(corpus, packing=packing).batches("train", batch_size=4, seed=0))
  keys = {"inputs", "targets", "weights"}
  keys |= {"segment_ids", "positions"} if packing == "documents" else set()
  assert set(batch) == keys
  for key, array in batch.items():
    assert array.shape == (4, LENGTH)
    assert array.dtype == (np.float32 if key == "weights" else np.int32)


def test_an_epoch_has_each_row_once_and_every_epoch_another_order(dataset):
  rows = rows_in(dataset)
  stream = names(take(dataset.batches("train", batch_size=1, seed=0), 2 * rows))
  first, second = stream[:rows], stream[rows:]
  everything = names(dataset.epoch("train", batch_size=1))
  assert sorted(first) == sorted(second) == sorted(everything)
  assert first != second and first != everything


def test_the_order_depends_on_the_seed_only(corpus, dataset):
  first = take(dataset.batches("train", batch_size=4, seed=3), 20)
  assert_same(first, take(dataset.batches("train", batch_size=4, seed=3), 20))
  for threads in (0, 4):
    other = make(corpus, num_threads=threads, prefetch=3)
    assert_same(first, take(other.batches("train", batch_size=4, seed=3), 20))
  assert names(first) != names(take(dataset.batches("train", batch_size=4, seed=4), 20))


def test_a_fresh_interpreter_draws_the_same(corpus, dataset):
  script = (
    "import sys, json, hashlib, itertools\n"
    "from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset\n"
    "c = sys.argv[1]\n"
    "s = LocalFiles(train=c + '/train.txt', validation=c + '/valid.txt', document='line')\n"
    "d = TextDataset(s, ByteTokenizer(), length=16, cache_dir=c + '/other')\n"
    "b = d.batches('train', batch_size=4, seed=3)\n"
    "rows = [x['inputs'].tolist() for x in itertools.islice(b, 10)]\n"
    "print(json.dumps([rows, b.get_state()]))"
  )
  command = [sys.executable, "-c", script, str(corpus)]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  here = dataset.batches("train", batch_size=4, seed=3)
  rows = [batch["inputs"].tolist() for batch in take(here, 10)]
  assert json.loads(result.stdout) == [rows, here.get_state()]


@pytest.mark.parametrize("packing", ["documents", "blocks"])
@pytest.mark.parametrize("epochs", [0.4, 0.98, 2.5])
def test_resuming_gives_the_batches_that_would_have_come(corpus, packing, epochs):
  dataset = make(corpus, packing=packing)
  steps = int(epochs * rows_in(dataset) / 4)
  whole = dataset.batches("train", batch_size=4, seed=1)
  take(whole, steps)
  state = json.loads(json.dumps(whole.get_state()))
  assert state["step"] == steps and abs(whole.epochs["epoch"] - epochs) < 0.05
  expected = take(whole, 10)  # 0.98: these cross the border of an epoch
  resumed = make(corpus, packing=packing).batches("train", batch_size=4, seed=1)
  resumed.set_state(state)
  assert resumed.get_state() == state
  assert_same(take(resumed, 10), expected)
  resumed.set_state(state)  # also of an iterator that has moved on and read ahead
  assert_same(take(resumed, 10), expected)


def test_hosts_share_each_step_and_their_number_may_change(dataset):
  whole = take(dataset.batches("train", batch_size=8, seed=5), 40)  # more than an epoch
  rows = [names([batch]) for batch in whole]
  for count in (2, 4):
    hosts = [
      take(dataset.batches("train", batch_size=8, seed=5, shard=(index, count)), 40)
      for index in range(count)
    ]
    for step, row in enumerate(rows):
      shares = [names([host[step]]) for host in hosts]
      for index, share in enumerate(shares):
        assert share == row[index * 8 // count : (index + 1) * 8 // count]
  four = dataset.batches("train", batch_size=8, seed=5, shard=(3, 4))
  take(four, 17)
  two = dataset.batches("train", batch_size=8, seed=5, shard=(1, 2))
  two.set_state(four.get_state())
  assert names(take(two, 5)) == [name for row in rows[17:22] for name in row[4:]]


def test_another_origin_is_refused_field_by_field(corpus, dataset, tmp_path):
  state = dataset.batches("train", batch_size=4, seed=1).get_state()
  other = make(corpus, length=15, packing="blocks", separator="none")
  with pytest.raises(ValueError, match="the saved place in the data is of other data") as caught:
    other.batches("validation", batch_size=2, seed=2).set_state(state)
  for expected in (
    "batch_size was 4, is 2",
    "length was 16, is 15",
    "packing was 'documents', is 'blocks'",
    "seed was 1, is 2",
    "separator was 'end', is 'none'",
    "split was 'train', is 'validation'",
    "source.digest was",
  ):
    assert expected in str(caught.value)
  assert "source.files" not in str(caught.value)

  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  (tmp_path / "vocab.txt").write_text("\n".join([*specials, "line", "of", "the", "corpus"]))
  tokenizer = WordPiece(tmp_path / "vocab.txt")
  words = TextDataset(dataset.source, tokenizer, length=LENGTH, cache_dir=tmp_path)
  with pytest.raises(ValueError, match=r"tokenizer.kind was 'ByteTokenizer', is 'WordPiece'"):
    words.batches("train", batch_size=4, seed=1).set_state(state)


@pytest.mark.parametrize("state", [None, {}, {"step": 3}, {"next_index": 3}])
def test_what_is_no_state_is_refused(dataset, state):
  with pytest.raises(ValueError, match="is not a place in batches"):
    dataset.batches("train", batch_size=4, seed=1).set_state(state)


@pytest.mark.parametrize("packing", ["documents", "blocks", "none"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_evaluation_epoch_has_each_target_once(corpus, packing, count):
  dataset = make(corpus, packing=packing, length=64)
  hosts = [
    list(dataset.epoch("validation", batch_size=6, shard=(index, count))) for index in range(count)
  ]
  assert len({len(host) for host in hosts}) == 1
  batches = [batch for host in hosts for batch in host]
  assert {batch["inputs"].shape for batch in batches} == {(6 // count, 64)}
  weight = sum(batch["weights"].sum() for batch in batches)
  assert weight == dataset.targets("validation")
  tokens = dataset.targets("validation") + (1 if packing == "blocks" else 100)
  assert tokens == dataset.text_bytes("validation") + 100  # one end a document
  ratio = dataset.text_bytes("validation") / weight
  assert dataset.bytes_per_target("validation") == pytest.approx(ratio)


def test_blocks_of_wikitext_are_those_of_the_literature(shared, tmp_path):
  folder = shared / "data"
  source = LocalFiles(
    validation=folder / "wikitext-2" / "valid.tokens.txt.xz", replace={"<unk>": "[UNK]"}
  )
  tokenizer = WordPiece(folder / "vocab" / "bert-base-uncased" / "vocab.txt")
  dataset = TextDataset(
    source, tokenizer, length=128, packing="blocks", separator="none", cache_dir=tmp_path
  )
  (text,) = source.documents("validation")
  ids = tokenizer.encode(text)
  assert dataset.targets("validation") == len(ids) - 1
  assert dataset.text_bytes("validation") == len(text.encode())
  first = next(dataset.epoch("validation", batch_size=4))
  np.testing.assert_array_equal(first["inputs"].ravel(), ids[:512])
  np.testing.assert_array_equal(first["targets"].ravel(), ids[1:513])
  joined = [batch["targets"] for batch in dataset.streams("validation", batch_size=1)]
  np.testing.assert_array_equal(np.concatenate(joined, 1)[0, : len(ids) - 1], ids[1:])


def test_streams_cover_the_split_once(dataset):
  batches = list(dataset.streams("validation", batch_size=3))
  tokens = dataset.text_bytes("validation") + 100
  assert sum(batch["weights"].sum() for batch in batches) == tokens - 1
  assert set(batches[0]) == {"inputs", "targets", "weights"}


def test_batches_come_fast_enough(tmp_path):
  (tmp_path / "a.txt").write_text("\n".join("x" * (n % 700) for n in range(5000)))
  source = LocalFiles(train=tmp_path, document="line")
  dataset = TextDataset(source, ByteTokenizer(), length=256, cache_dir=tmp_path / ".cache")
  batches = dataset.batches("train", batch_size=32, seed=0)
  take(batches, 5)
  start = time.perf_counter()
  take(batches, 200)
  assert 200 * 32 / (time.perf_counter() - start) > 2000


@pytest.mark.parametrize(
  "arguments, error, text",
  [
    ({"batch_size": 6, "shard": (0, 4)}, ValueError, "batch_size=6 is no multiple of the 4 hosts"),
    ({"batch_size": 10_000}, ValueError, r"split 'train' has \d+ rows of length=16, fewer than"),
    ({"batch_size": 0}, ValueError, "batch_size=0 — expected a whole number of at least 1"),
    ({"batch_size": 4.0}, TypeError, "batch_size=4.0 — expected a whole number"),
    ({"seed": -1}, ValueError, "seed=-1 — expected a whole number from 0 to 4294967295"),
    ({"seed": None}, TypeError, "seed=None — expected a whole number"),
    ({"shard": (2, 2)}, ValueError, r"shard=\(2, 2\) — expected \(index, count\)"),
    ({"shard": ("0", "2")}, ValueError, "expected .index, count. with 0 <= index < count"),
    ({"shard": 1}, ValueError, "shard=1 — expected"),
    ({"split": "dev"}, ValueError, "no split 'dev' — it has train, validation"),
  ],
)
def test_wrong_arguments_of_batches_are_errors(dataset, arguments, error, text):
  arguments = {"split": "train", "batch_size": 4, "seed": 0, **arguments}
  with pytest.raises(error, match=text):
    dataset.batches(arguments.pop("split"), **arguments)


@pytest.mark.parametrize(
  "changes, error, text",
  [
    ({"length": 0}, ValueError, "length=0 — expected a whole number of at least 1"),
    ({"length": "128"}, TypeError, "length='128' — expected a whole number"),
    ({"packing": "block"}, ValueError, "packing='block' is unknown — expected one of documents,"),
    ({"separator": None}, ValueError, "separator=None is unknown"),
    ({"num_threads": True}, TypeError, "num_threads=True — expected a whole number"),
    ({"prefetch": 0}, ValueError, "prefetch=0 — expected a whole number of at least 1"),
  ],
)
def test_wrong_settings_are_errors_at_once(corpus, changes, error, text):
  with pytest.raises(error, match=text):
    make(corpus, **changes)


def test_what_is_no_source_or_tokenizer_is_an_error():
  source = LocalFiles(train="a.txt")
  with pytest.raises(
    TypeError, match=r"tokenizer is the class ByteTokenizer .* @ByteTokenizer\(\)"
  ):
    TextDataset(source, ByteTokenizer, length=4)
  with pytest.raises(TypeError, match=r"source='a.txt' of type str — expected a Source"):
    TextDataset("a.txt", ByteTokenizer(), length=4)
  with pytest.raises(TypeError, match=r"of type LocalFiles — expected a Tokenizer such as"):
    TextDataset(source, source, length=4)


def test_lengths_that_do_not_fit_name_the_split(corpus):
  with pytest.raises(
    ValueError, match="split 'train': packing=\"none\" puts one document in a row"
  ):
    make(corpus, packing="none").batches("train", batch_size=4, seed=0)
  with pytest.raises(
    ValueError, match="split 'train': length=99999 is longer than the whole split"
  ):
    make(corpus, packing="blocks", length=99_999).batches("train", batch_size=4, seed=0)
