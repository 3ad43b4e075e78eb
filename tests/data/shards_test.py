"""Shards: each host reads its own alone, all of them every row once, and goes on where it was."""

from __future__ import annotations

import collections
import itertools
import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxmix.data import (
  TFDS,
  ByteTokenizer,
  LocalFiles,
  StandardLibrary,
  TextDataset,
  prepare_tfds,
)

SHARDS, READERS, LENGTH = 8, 4, 32


class CountingTokenizer(ByteTokenizer):
  """Bytes, noting each text that is encoded."""

  def __init__(self):
    self.texts = []

  def encode_batch(self, texts):
    self.texts += texts
    return super().encode_batch(texts)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Files of one size, so that readers come to the ends of their epochs together."""
  folder = tmp_path_factory.mktemp("corpus")
  for shard in range(SHARDS):
    lines = (f"shard {shard} line {line:03} " + "!" * (line % 23) for line in range(60))
    (folder / f"train-{shard}.txt").write_text("\n".join(lines))
  (folder / "valid.txt").write_text("\n".join(f"held out {line}" for line in range(50)))
  return folder


@pytest.fixture(scope="module")
def make(corpus):
  def make(*, train="train-*.txt", **changes):
    source = LocalFiles(train=str(corpus / train), validation=corpus / "valid.txt", document="line")
    settings = {"length": LENGTH, "readers": READERS, "cache_dir": corpus / ".cache", **changes}
    return TextDataset(source, CountingTokenizer(), **settings)

  return make


def take(batches, count):
  return list(itertools.islice(batches, count))


def names(batches):
  return [row.tobytes() for batch in batches for row in batch["inputs"]]


def hosts_of(make, count):
  """The batches of each of `count` hosts."""
  return [
    make().batches("train", batch_size=8, seed=3, shard=(index, count)) for index in range(count)
  ]


def text_of(rows):
  return "".join(ByteTokenizer().decode(row) for row in rows)


def state_of(hosts):
  """What the hosts would tell one another, as JSON gives it back."""
  states = [host.get_state() for host in hosts]
  lanes = {number: place for state in states for number, place in state["lanes"].items()}
  return json.loads(json.dumps({**states[0], "lanes": lanes}))


def shards_in(texts):
  return {int(re.match(r"shard (\d)", text)[1]) for text in texts}


@pytest.fixture(scope="module")
def everything(make):
  """Each row of the corpus."""
  files = [make(train=f"train-{shard}.txt", readers=None) for shard in range(SHARDS)]
  return names(row for data in files for row in data.epoch("train", batch_size=1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_hosts_together_have_each_row_once_an_epoch(make, everything, count):
  hosts = hosts_of(make, count)
  epochs = []
  for epoch in (1, 2):
    taken = [take(host, len(everything) // 8) for host in hosts]
    epochs.append(names(batch for host in taken for batch in host))
    assert sorted(epochs[-1]) == sorted(everything)
    assert all(host.epochs == {"epoch": epoch} for host in hosts)
  assert epochs[0] != epochs[1] != everything


def test_a_host_tokenises_its_own_shards_alone_and_once(make, everything, tmp_path):
  data = make(cache_dir=tmp_path)
  host = data.batches("train", batch_size=8, seed=3, shard=(1, 2))
  take(host, 2 * len(everything) // 8)
  assert host.epochs == {"epoch": 2}
  assert shards_in(data.tokenizer.texts) == set(range(1, SHARDS, 2))
  assert set(collections.Counter(data.tokenizer.texts).values()) == {1}


def test_the_order_depends_on_the_seed_and_mixes_the_shards(make):
  def rows(seed, **changes):
    return names(take(make(**changes).batches("train", batch_size=8, seed=seed), 12))

  assert rows(1) == rows(1, num_threads=0) == rows(1, num_threads=2, prefetch=1) != rows(2)
  first = next(make().batches("train", batch_size=8, seed=1))["inputs"]
  assert len(set(re.findall(r"shard (\d) line", text_of(first)))) == READERS


def test_a_step_covers_the_same_rows_on_any_number_of_hosts(make):
  (alone,) = hosts_of(make, 1)
  whole = take(alone, 40)
  for count in (2, 4):
    hosts = hosts_of(make, count)
    for step, shares in enumerate(zip(*(take(host, 40) for host in hosts), strict=True)):
      for index, share in enumerate(shares):
        assert names([share]) == names([whole[step]])[index::count]


@pytest.mark.parametrize("steps", [3, 29, 41])  # in a first shard, near an epoch's end, in a second
@pytest.mark.parametrize("count", [1, 2, 4])
def test_resuming_goes_on_as_if_uninterrupted_also_on_other_hosts(make, steps, count):
  (alone,) = hosts_of(make, 1)
  expected = take(alone, steps + 30)[steps:]
  before = hosts_of(make, 2)
  for host in before:
    take(host, steps)
  state = state_of(before)
  assert state["step"] == steps
  after = hosts_of(make, count)
  for index, host in enumerate(after):
    host.set_state(state)
    assert host.step == steps
    assert names(take(host, 30)) == [
      name for batch in expected for name in names([batch])[index::count]
    ]
  assert state_of(after)["step"] == steps + 30


def test_resuming_reads_the_shard_it_stood_in_and_none_before(make, tmp_path):
  batches = make(readers=2).batches("train", batch_size=4, seed=0)
  places = []
  while {place["turn"] for place in places} != {2}:
    next(batches)
    places = list(batches.get_state()["lanes"].values())
  state = batches.get_state()
  assert all(place["row"] <= 2 for place in places), "the shards that follow are not opened yet"
  expected = names([next(batches)])

  # Without threads, which read ahead: into the next shard, on a slow machine.
  kept, fresh = (make(readers=2, num_threads=0, **at) for at in ({}, {"cache_dir": tmp_path}))
  for data in (kept, fresh):
    resumed = data.batches("train", batch_size=4, seed=0)
    resumed.set_state(state)
    assert names([next(resumed)]) == expected
  assert not kept.tokenizer.texts, "what a disk has is not tokenised again"
  assert len(shards_in(fresh.tokenizer.texts)) == 2, "on an empty one, a shard for each reader"
  assert len(fresh.tokenizer.texts) == 2 * 60, "and its documents once"


def test_batches_that_were_read_ahead_do_not_count(make):
  batches = make(prefetch=16).batches("train", batch_size=8, seed=0)
  take(batches, 2)
  drawn = [place["row"] for place in batches.get_state()["lanes"].values()]
  assert drawn == [4] * READERS


def test_array_record_files_are_shards_as_text_files_are(corpus, tmp_path):
  source = LocalFiles(train=str(corpus / "train-*.txt"), validation=corpus / "valid.txt")
  prepare_tfds(source, name="corpus", data_dir=tmp_path, shards=4)
  stored = TFDS("corpus", data_dir=tmp_path)
  assert [len(list(shard.documents("train"))) for _, shard in stored.shards("train")] == [2] * 4
  assert len(stored.shards("validation")) == 1, "of one document there is one shard"
  part = TFDS("corpus", data_dir=tmp_path, train="train[1:5]")
  joined = [text for _, shard in part.shards("train") for text in shard.documents("train")]
  assert joined == list(source.documents("train"))[1:5]
  assert len(part.shards("train")) == 3

  data = TextDataset(stored, ByteTokenizer(), length=LENGTH, readers=2, cache_dir=tmp_path)
  rows = [
    np.concatenate([batch["inputs"] for batch in take(host, 20)])
    for host in (data.batches("train", batch_size=8, seed=0, shard=(i, 2)) for i in range(2))
  ]
  seen = [
    {int(number) for number in re.findall(r"shard (\d) line", text_of(each))} for each in rows
  ]
  assert seen[0] and seen[1] and not seen[0] & seen[1]
  with pytest.raises(ValueError, match="made from other text or in other shards"):
    prepare_tfds(source, name="corpus", data_dir=tmp_path, shards=2)
  with pytest.raises(ValueError, match="shards=0 — expected a whole number of at least 1"):
    prepare_tfds(source, name="corpus", data_dir=tmp_path, shards=0)


def test_shards_without_a_row_are_passed_over(corpus, tmp_path):
  (tmp_path / "a.txt").write_text("short")
  (tmp_path / "b.txt").write_text((corpus / "train-1.txt").read_text())
  (tmp_path / "c.txt").write_text("")
  settings = {"length": LENGTH, "packing": "blocks", "cache_dir": tmp_path / ".cache"}
  rows = []
  for train, readers in (("b.txt", None), ("*.txt", 1)):
    source = LocalFiles(train=str(tmp_path / train))
    data = TextDataset(source, ByteTokenizer(), readers=readers, **settings)
    batches = data.batches("train", batch_size=1, seed=0)
    taken = []
    while batches.epochs["epoch"] < 3:
      taken += names([next(batches)])
    rows.append(collections.Counter(taken))
  assert rows[0] == rows[1] and set(rows[0].values()) == {3}


def test_where_no_shard_has_a_row_the_error_names_them(tmp_path):
  (tmp_path / "a.txt").write_text("short")
  data = TextDataset(
    LocalFiles(train=tmp_path / "a.txt"),
    ByteTokenizer(),
    length=LENGTH,
    packing="blocks",
    readers=1,
    cache_dir=tmp_path / ".cache",
  )
  with pytest.raises(
    ValueError, match=r"none of the shards .*a\.txt holds a row .* smaller length"
  ):
    next(data.batches("train", batch_size=2, seed=0))


def test_a_shard_that_cannot_be_read_is_named(corpus, tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff")
  data = TextDataset(
    LocalFiles(train=tmp_path / "a.txt"), ByteTokenizer(), length=8, readers=1, cache_dir=tmp_path
  )
  with pytest.raises(ValueError, match=r"a\.txt: byte 0 \(0xff\) does not decode"):
    next(data.batches("train", batch_size=2, seed=0))


def test_evaluation_reads_a_split_whole_and_what_nobody_reads_has_no_size(make):
  data, whole = make(), make(readers=None)
  assert data.targets("train") is None and data.bytes_per_target("train") is None
  for figure in ("targets", "bytes_per_target"):
    assert getattr(data, figure)("validation") == getattr(whole, figure)("validation")
  held_out = [names(each.epoch("validation", batch_size=4)) for each in (data, whole)]
  assert held_out[0] == held_out[1]
  assert not [text for text in data.tokenizer.texts if text.startswith("shard")]


@pytest.mark.parametrize(
  "readers, hosts, text",
  [
    (
      16,
      2,
      "split 'train' has 8 shards, fewer than readers=16 — expected at least one for each — set "
      "readers=8, or cut the text into more shards: jaxmix.data.prepare_tfds(source, name=..., "
      "data_dir=..., shards=16)",
    ),
    (8, 16, "split 'train' has 8 shards, fewer than the 16 hosts — expected at least one for each"),
    (6, 4, "readers=6 cannot be shared equally by 4 hosts — expected a multiple of the hosts — set "
     "readers=8, or, for a run that has begun, take a number of hosts that divides 6"),
    (7, 3, "set readers=6, or"),
  ],
)  # fmt: skip
def test_shards_that_do_not_suffice_are_an_error_with_the_remedy(make, readers, hosts, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    make(readers=readers).batches("train", batch_size=48, seed=0, shard=(0, hosts))


@pytest.mark.parametrize(
  "changes, text",
  [({"readers": 2}, "readers was 4, is 2"), ({"readers": None}, "readers was 4, is None")],
)
def test_another_way_of_reading_is_refused(make, changes, text):
  state = make().batches("train", batch_size=8, seed=0).get_state()
  with pytest.raises(ValueError, match=text):
    make(**changes).batches("train", batch_size=8, seed=0).set_state(state)


def test_shards_that_changed_are_refused(corpus, tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for shard in range(2):
    (folder / f"{shard}.txt").write_text((corpus / f"train-{shard}.txt").read_text())

  def batches():
    source = LocalFiles(train=folder, document="line")
    data = TextDataset(source, ByteTokenizer(), length=LENGTH, readers=2, cache_dir=tmp_path)
    return data.batches("train", batch_size=4, seed=0)

  first = batches()
  next(first)
  state = first.get_state()
  text = (folder / "1.txt").read_text()
  (folder / "1.txt").write_text(text.replace("shard", "sh\nrd"))  # of the same size
  resumed = batches()
  resumed.set_state(state)
  with pytest.raises(ValueError, match=r"1\.txt has \d+ rows, and had \d+ when the place in the"):
    take(resumed, 2)
  (folder / "1.txt").write_text(text + "!")
  with pytest.raises(ValueError, match=r"source\.bytes was \d+, is \d+; source\.digest was"):
    batches().set_state(state)


def test_the_place_of_one_host_of_several_is_refused(make):
  hosts = hosts_of(make, 2)
  with pytest.raises(ValueError, match="lacks the readers 1, 3 — expected those of all hosts"):
    hosts[1].set_state(hosts[0].get_state())


def test_a_source_without_shards_is_refused():
  with pytest.raises(TypeError, match=r"with readers, source=.* expected a ShardedSource such as"):
    TextDataset(StandardLibrary(), ByteTokenizer(), length=8, readers=2)


def test_a_process_ends_at_once_and_quietly_while_a_shard_is_being_read(tmp_path):
  for shard in range(2):
    (tmp_path / f"{shard}.txt").write_text("a line of text\n" * 200)
  script = (
    "import sys, time\n"
    "from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset\n"
    "class Slow(ByteTokenizer):\n"
    "  def encode_batch(self, texts):\n"
    "    print('reading', flush=True)\n"
    "    time.sleep(0.3)\n"
    "    return super().encode_batch(texts)\n"
    "from jaxmix.data import token_store\n"
    "token_store._BATCH_CHARACTERS = 20\n"
    "source = LocalFiles(train=sys.argv[1] + '/*.txt', document='line')\n"
    "data = TextDataset(source, Slow(), length=8, readers=2, cache_dir=sys.argv[1] + '/c')\n"
    "batches = data.batches('train', batch_size=2, seed=0)\n"
    "batches._iterator.start_prefetch()\n"
    "time.sleep(1)\n"
  )
  command = [sys.executable, "-c", script, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
  assert "reading" in done.stdout and not done.stderr


ONE_OF_TWO = """
import json, sys
import jax

port, index, corpus = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset

source = LocalFiles(train=corpus + "/train-*.txt", document="line")
data = TextDataset(
  source, ByteTokenizer(), length=32, readers=4, cache_dir=f"{corpus}/.cache {index}"
)
batches = data.batches("train", batch_size=8, seed=3, shard=(index, 2))
for _ in range(45):
  next(batches)
print(json.dumps(batches.get_state()))
"""


def test_processes_tell_one_another_where_they_stand(make, corpus):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", ONE_OF_TWO, port, str(index), str(corpus)],
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [process.communicate(timeout=120)[0] for process in processes]
  states = [json.loads(output.splitlines()[-1]) for output in outputs]  # gloo speaks before
  (alone,) = hosts_of(make, 1)
  take(alone, 45)
  assert states == [alone.get_state()] * 2
