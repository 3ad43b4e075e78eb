"""Mixtures: exact proportions, each source in its own order, a place in all of them at once."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from jaxmix.data import ByteTokenizer, LocalFiles, Mixture, TextDataset, WordPiece
from jaxmix.data.schedule import Schedule

LENGTH = 16
ALPHABETS = {"a": "abcdefgh", "b": "ijklmnop", "c": "qrstuvwx"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  random = np.random.RandomState(0)
  for name, lines in (("a", 50), ("b", 80), ("c", 30)):
    for part in ("0", "1", "2", "3", "valid"):
      text = random.choice(list(ALPHABETS[name]), (lines, 20))  # no two rows are the same
      (folder / f"{name}-{part}.txt").write_text("\n".join(map("".join, text)))
  return folder


@pytest.fixture(scope="module")
def source_of(corpus):
  """name -> the data set of it, as it would be alone; c has no validation split."""

  def make(name, **changes):
    settings = {"length": LENGTH, "cache_dir": corpus / "cache", **changes}
    validation = None if name == "c" else corpus / f"{name}-valid.txt"
    source = LocalFiles(str(corpus / f"{name}-[0-9].txt"), validation, document="line")
    return TextDataset(source, ByteTokenizer(), **settings)

  return make


@pytest.fixture(scope="module")
def mix(source_of):
  def mix(weights, *, readers=None, **settings):
    readers = readers if isinstance(readers, dict) else dict.fromkeys(weights, readers)
    sources = {
      name: (source_of(name, readers=readers[name]), weight) for name, weight in weights.items()
    }
    return Mixture(sources, **settings)

  return mix


def take(batches, count):
  return list(itertools.islice(batches, count))


def names(batches):
  return [row.tobytes() for batch in batches for row in batch["inputs"]]


def origins(batches):
  """The source that each row is from, and it from that alone."""
  found = []
  for row in (row for batch in batches for row in batch["inputs"]):
    text = set(ByteTokenizer().decode(row[row > 0]))
    (source,) = (name for name, alphabet in ALPHABETS.items() if text & set(alphabet))
    found.append(source)
  return found


@pytest.mark.parametrize(
  "weights, shares",
  [
    ({"a": 0.7, "b": 0.3}, {"a": 7, "b": 3}),
    ({"a": 2, "b": 4, "c": 6}, {"a": 1, "b": 2, "c": 3}),
    ({"a": 1e-3, "b": 0.999}, {"a": 1, "b": 999}),
    ({"a": np.float64(0.125), "b": 0.5, "c": 0.375}, {"a": 1, "b": 4, "c": 3}),
    ({f"s{i}": weight for i, weight in enumerate((5, 3, 3, 2, 2, 1, 1, 90))}, None),
    ({"a": 3.5}, {"a": 1}),
  ],
)
def test_a_schedule_is_never_off_by_a_row(weights, shares):
  schedule = Schedule(weights)
  assert shares is None or schedule.shares == shares
  wanted = np.array(list(weights.values()), float)
  wanted /= wanted.sum()
  counts = np.zeros(len(weights), int)
  for row in range(2 * schedule.period + 5):
    assert list(schedule.drawn(row).values()) == counts.tolist()
    assert (abs(counts - row * wanted) < 1).all()
    source, earlier = schedule[row]
    assert earlier == counts[source]
    counts[source] += 1
  assert schedule.drawn(schedule.period * 10**9) == {
    name: share * 10**9 for name, share in schedule.shares.items()
  }


@pytest.mark.parametrize("readers", [None, 4, {"a": 4, "b": None, "c": 4}])
def test_the_proportions_hold_at_every_step(mix, readers):
  weights = {"a": 0.5, "b": 0.3, "c": 0.2}
  batches = mix(weights, readers=readers).batches("train", batch_size=20, seed=0)
  found = []
  lanes = 4 if readers else 1
  for _ in range(60):
    found += origins([next(batches)])
    for name, weight in weights.items():
      assert abs(found.count(name) - weight * len(found)) < lanes


@pytest.mark.parametrize("readers", [None, 4])
def test_a_source_is_read_as_it_would_be_alone_and_its_epochs_are_counted(mix, source_of, readers):
  mixture = mix({"a": 1, "b": 3}, readers=readers).batches("train", batch_size=16, seed=5)
  rows = names(take(mixture, 80))
  for name in "ab":
    alone = source_of(name, readers=readers).batches("train", batch_size=4, seed=5)
    drawn = 80 * {"a": 4, "b": 12}[name]
    mine = names(take(alone, drawn // 4))
    assert mixture.epochs[f"epoch_{name}"] == pytest.approx(alone.epochs["epoch"])
    own = set(mine)
    in_mixture = [row for row in rows if row in own]
    assert sorted(in_mixture) == sorted(mine)
    if readers is None:
      assert in_mixture == mine, "in the same order"
  assert mixture.epochs["epoch_a"] > 1


@pytest.mark.parametrize("readers", [None, 4, {"a": None, "b": 4}])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_resuming_goes_on_as_if_uninterrupted_on_any_hosts(mix, readers, count):
  def hosts(number):
    data = mix({"a": 0.6, "b": 0.4}, readers=readers)
    return [
      data.batches("train", batch_size=8, seed=1, shard=(index, number)) for index in range(number)
    ]

  (alone,) = hosts(1)
  expected = take(alone, 75)[45:]
  before = hosts(2)
  for host in before:
    take(host, 45)
  states = [host.get_state() for host in before]
  lanes = {lane: place for state in states for lane, place in state.get("lanes", {}).items()}
  state = json.loads(json.dumps({**states[0], "lanes": lanes}))
  for index, host in enumerate(hosts(count)):
    host.set_state(state)
    rows = range(8)[index::count] if readers else range(8)[8 * index // count :][: 8 // count]
    assert names(take(host, 30)) == [names([batch])[row] for batch in expected for row in rows]


def test_every_lane_has_all_sources_and_a_batch_its_share(mix):
  batches = mix({"a": 1, "b": 1}, readers=4).batches("train", batch_size=8, seed=0)
  for batch in take(batches, 20):
    found = origins([batch])
    assert found.count("a") == found.count("b") == 4
  batches = mix({"a": 1, "b": 1}, readers=4).batches("train", batch_size=4, seed=0, shard=(0, 4))
  assert set(origins(take(batches, 8))) >= {"a", "b"}


def test_other_weights_and_sources_are_refused(mix):
  state = mix({"a": 1, "b": 1}).batches("train", batch_size=4, seed=0).get_state()
  with pytest.raises(ValueError, match=r"sources\.a\.share was 1, is 3"):
    mix({"a": 3, "b": 1}).batches("train", batch_size=4, seed=0).set_state(state)
  with pytest.raises(ValueError, match=r"sources\.b\.length was 16, is None"):
    mix({"a": 1, "c": 1}).batches("train", batch_size=4, seed=0).set_state(state)


def test_evaluation_is_over_all_sources_or_one(mix, source_of):
  mixture, a, b = mix({"a": 0.9, "b": 0.1, "c": 0.1}), source_of("a"), source_of("b")
  both = [names(each.epoch("validation", batch_size=1)) for each in (a, b)]
  epoch = list(mixture.epoch("validation", batch_size=1))
  assert sorted(names(epoch)) == sorted(both[0] + both[1]), "c has no such split"
  assert sum(batch["weights"].sum() for batch in epoch) == mixture.targets("validation")
  assert mixture.targets("validation") == a.targets("validation") + b.targets("validation")
  bytes_of = [each.text_bytes("validation") for each in (a, b)]
  assert mixture.bytes_per_target("validation") == sum(bytes_of) / mixture.targets("validation")
  for end in range(20, len(epoch), 20):  # any beginning is of both, each as far as the other
    found = names(epoch[:end])
    through = [sum(row in found for row in rows) / len(rows) for rows in both]
    assert abs(through[0] - through[1]) < 1 / 50

  assert names(mixture.epoch("b/validation", batch_size=1)) == both[1]
  assert mixture.targets("b/validation") == b.targets("validation")
  assert mixture.bytes_per_target("b/train") == b.bytes_per_target("train")
  assert mixture.bytes_per_target("train") is None, "its batches have other shares than its text"
  streams = [names(each) for each in (
    mixture.streams("b/validation", batch_size=2), b.streams("validation", batch_size=2)
  )]  # fmt: skip
  assert streams[0] == streams[1]
  with pytest.raises(ValueError, match=r"is not one text .* name it, such as a/validation"):
    mixture.streams("validation", batch_size=2)
  one = [names(take(each, 3)) for each in (
    mixture.batches("b/train", batch_size=4, seed=0), b.batches("train", batch_size=4, seed=0)
  )]  # fmt: skip
  assert one[0] == one[1]


def test_a_mixture_is_text_like_its_sources(mix, source_of):
  mixture = mix({"a": 1, "b": 2})
  assert isinstance(mixture, TextDataset)
  assert mixture.outline == source_of("a").outline
  assert mixture.vocab_size == 257 and mixture.tokenizer.end_id == 256
  assert mixture.targets("train") == sum(source_of(name).targets("train") for name in "ab")
  assert mix({"a": 1, "b": 2}, readers=2).targets("train") is None


@pytest.mark.parametrize(
  "weight, error, text",
  [
    (
      0,
      ValueError,
      "the weight of source 'b' is 0 — expected a positive number — set one, or leave",
    ),
    (-0.1, ValueError, "is -0.1"),
    (float("nan"), ValueError, "is nan"),
    ("0.5", TypeError, "is '0.5'"),
    (True, TypeError, "is True"),
    (1 / 3, ValueError, "too many digits: .* set {'a': 750, 'b': 250}"),
  ],
)
def test_wrong_weights_are_errors(mix, weight, error, text):
  with pytest.raises(error, match=text):
    mix({"a": 1, "b": weight})


def test_what_does_not_mix_is_an_error(source_of, mix, tmp_path):
  a = source_of("a")
  for sources in ({}, [a], {"a": a}, {"a": (a,)}, {1: (a, 1)}):
    with pytest.raises(TypeError, match=r"expected {name: \(data set, weight\)}"):
      Mixture(sources)
  with pytest.raises(TypeError, match="source 'b' is 'text' of type str — expected a TextDataset"):
    Mixture({"a": (a, 1), "b": ("text", 1)})
  with pytest.raises(TypeError, match="of type Mixture — expected a TextDataset"):
    Mixture({"a": (a, 1), "b": (mix({"b": 1}), 1)})
  with pytest.raises(ValueError, match="source 'a/b' — expected a name without /"):
    Mixture({"a/b": (a, 1)})
  with pytest.raises(ValueError, match="differ in length: a has 16, b has 8 — expected one"):
    Mixture({"a": (a, 1), "b": (source_of("b", length=8), 1)})
  with pytest.raises(ValueError, match="differ in packing"):
    Mixture({"a": (a, 1), "b": (source_of("b", packing="blocks"), 1)})
  with pytest.raises(ValueError, match="differ in readers: a has 2, b has 4"):
    mix({"a": 1, "b": 1}, readers={"a": 2, "b": 4})
  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  (tmp_path / "vocab.txt").write_text("\n".join(specials))
  words = TextDataset(a.source, WordPiece(tmp_path / "vocab.txt"), length=LENGTH)
  with pytest.raises(ValueError, match="differ in tokenizer"):
    Mixture({"a": (a, 1), "b": (words, 1)})


def test_errors_of_a_source_name_it(mix):
  mixture = mix({"a": 1, "b": 1}, readers=8)
  with pytest.raises(ValueError, match="source 'a': split 'train' has 4 shards, fewer than"):
    mixture.batches("train", batch_size=8, seed=0)
  with pytest.raises(ValueError, match="no source of the mixture has a split 'dev' — they have"):
    mixture.epoch("dev", batch_size=2)
  with pytest.raises(ValueError, match="no split 'dev'"):
    mixture.epoch("a/dev", batch_size=2)
