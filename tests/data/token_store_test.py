"""The token store: what it holds, and processes that meet, die or find no room."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmix.data import ByteTokenizer, LocalFiles, open_token_store

# A source whose documents take time and leave a trace, for processes that are watched or killed.
SLOW = """
import sys, time
from pathlib import Path
from jaxmix.data import ByteTokenizer, open_token_store

class Slow:
  splits = ("train",)
  def fingerprint(self, split):
    return {"kind": "Slow"}
  def documents(self, split):
    with open(Path(sys.argv[1]) / "trace", "a") as trace:
      trace.write("x")
    for number in range(20):
      time.sleep(float(sys.argv[2]))
      yield f"document {number} " * 300_000

store = open_token_store(Slow(), "train", ByteTokenizer(), cache_dir=sys.argv[1])
print(len(store.tokens), store.documents)
"""


@pytest.fixture
def corpus(tmp_path):
  (tmp_path / "a.txt").write_text("one\nzwei ü\n\nthree\n")
  return LocalFiles(train=tmp_path / "a.txt", document="line")


class CountingTokenizer(ByteTokenizer):
  """Bytes, counting the texts that are encoded."""

  def __init__(self, vocab_size=257):
    self.vocab_size = vocab_size
    self.encoded = 0

  def encode_batch(self, texts):
    self.encoded += len(texts)
    return super().encode_batch(texts)


def test_a_store_holds_the_documents_in_order_each_with_its_end(corpus, tmp_path):
  store = open_token_store(corpus, "train", ByteTokenizer(), cache_dir=tmp_path)
  tokenizer = ByteTokenizer()
  documents = [store.tokens[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
  assert [tokenizer.decode(ids) for ids in documents] == ["one", "zwei ü", "three"]
  assert [ids[-1] for ids in documents] == [tokenizer.end_id] * 3
  assert store.documents == 3 and store.text_bytes == len("onezwei üthree".encode())


def test_without_separator_documents_touch(corpus, tmp_path):
  store = open_token_store(corpus, "train", ByteTokenizer(), separator="none", cache_dir=tmp_path)
  assert ByteTokenizer().decode(store.tokens) == "onezwei üthree"
  assert store.offsets.tolist() == [0, 3, 10, 15]


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_ids_take_two_bytes_where_they_fit(corpus, tmp_path, vocab_size, dtype):
  tokenizer = CountingTokenizer(vocab_size)
  store = open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path)
  assert store.tokens.dtype == dtype and not store.tokens.flags.writeable


def test_the_second_use_encodes_nothing_and_another_text_is_another_store(corpus, tmp_path):
  tokenizer = CountingTokenizer()
  open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path / "cache")
  start = time.perf_counter()
  open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path / "cache")
  assert time.perf_counter() - start < 0.5  # a millisecond where nothing else runs
  assert tokenizer.encoded == 3
  (tmp_path / "a.txt").write_text("four")
  changed = open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path / "cache")
  assert tokenizer.encoded == 4 and changed.documents == 1


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "store.json"])
def test_a_truncated_store_is_computed_again(corpus, tmp_path, name):
  tokenizer = CountingTokenizer()
  before = open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path / "cache")
  expected = before.tokens.tolist()
  (file,) = (tmp_path / "cache").rglob(name)
  file.write_bytes(file.read_bytes()[:-1])
  after = open_token_store(corpus, "train", tokenizer, cache_dir=tmp_path / "cache")
  assert tokenizer.encoded == 6 and after.tokens.tolist() == expected


def test_an_error_in_the_text_leaves_nothing_behind(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
  source = LocalFiles(train=tmp_path / "a.jsonl")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
    open_token_store(source, "train", ByteTokenizer(), cache_dir=tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def run_slow(folder, pause):
  return subprocess.Popen(
    [sys.executable, "-c", SLOW, str(folder), str(pause)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_processes_that_meet_share_one_computation(tmp_path):
  processes = [run_slow(tmp_path, 0.02) for _ in range(3)]
  outputs = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0], outputs
  assert len({out for out, _ in outputs}) == 1
  assert (tmp_path / "trace").read_text() == "x"


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
  process = run_slow(tmp_path, 0.2)
  tokens = tmp_path / "tokens"
  deadline = time.monotonic() + 30
  while not any(file.stat().st_size for file in tokens.rglob("tokens.bin")):
    assert time.monotonic() < deadline, process.communicate()
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=30)
  assert [path.suffix for path in tokens.iterdir() if path.is_dir()] == [".partial"]
  again = run_slow(tmp_path, 0)
  out, err = again.communicate(timeout=60)
  assert again.returncode == 0, err
  assert out.split()[1] == "20" and (tmp_path / "trace").read_text() == "xx"
  assert [path.suffix for path in tokens.iterdir() if path.is_dir()] == [""]


def test_no_room_is_an_error_that_names_the_cache_and_leaves_nothing(tmp_path):
  limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
  command = [sys.executable, "-c", limit + SLOW, str(tmp_path), "0"]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 1
  last = result.stderr.strip().splitlines()[-1]
  assert f"the token cache {tmp_path / 'tokens'} has no room for the tokens" in last
  assert "put it elsewhere by cache_dir= or XDG_CACHE_HOME" in last
  assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(corpus, tmp_path):
  (tmp_path / "cache").write_text("a file in the way")
  with pytest.raises(OSError, match=r"the token cache .*cache/tokens cannot be written"):
    open_token_store(corpus, "train", ByteTokenizer(), cache_dir=tmp_path / "cache")


def test_a_store_says_what_it_was_made_from(corpus, tmp_path):
  open_token_store(corpus, "train", ByteTokenizer(), cache_dir=tmp_path / "cache")
  (file,) = (tmp_path / "cache").rglob("store.json")
  made_from = json.loads(file.read_text())["made_from"]
  assert made_from["source"] == corpus.fingerprint("train")
  assert made_from["tokenizer"] == {"kind": "ByteTokenizer"}


def test_a_split_without_tokens_and_a_wrong_separator_are_errors(corpus, tmp_path):
  class Silent(ByteTokenizer):
    end_id = None

    def encode(self, text):
      return np.zeros(0, np.int32)

  with pytest.raises(ValueError, match="split 'train' has 3 documents and no token"):
    open_token_store(corpus, "train", Silent(), cache_dir=tmp_path)
  with pytest.raises(ValueError, match="separator='eos' is unknown — expected one of end, none"):
    open_token_store(corpus, "train", ByteTokenizer(), separator="eos", cache_dir=tmp_path)
