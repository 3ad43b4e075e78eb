"""TFDS: what is prepared reads back as it was, without TensorFlow and without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from jaxmix.data import TFDS, ByteTokenizer, LocalFiles, TextDataset, prepare_tfds

# Prepares and reads where every connection fails, and checks that TensorFlow was not imported.
ALONE = """
import socket, sys, time

def refuse(*arguments, **named):
  raise RuntimeError("a connection was attempted")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from jaxmix.data import TFDS, LocalFiles, prepare_tfds

class Slow(LocalFiles):
  def documents(self, split):
    time.sleep(0.5)  # so that the processes meet
    yield from super().documents(split)

corpus, data_dir = sys.argv[1:]
source = Slow(train=corpus, validation=corpus, document="line")
prepare_tfds(source, name="my_corpus", data_dir=data_dir)
data = TFDS("my_corpus", data_dir=data_dir)
assert list(data.documents("train")) == list(source.documents("train"))
assert "tensorflow" not in sys.modules
print("read", len(list(data.documents("validation"))))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  file = tmp_path_factory.mktemp("corpus") / "a.txt"
  file.write_text("\n".join(f"line {number} ünïcödé 🙂" for number in range(200)))
  return file


@pytest.fixture(scope="module")
def source(corpus):
  return LocalFiles(train=corpus, test=corpus, document="line")


@pytest.fixture(scope="module")
def data_dir(source, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data sets")
  path = prepare_tfds(source, name="my_corpus", data_dir=folder)
  assert path == folder / "my_corpus" / "1.0.0"
  return folder


def test_a_round_trip_keeps_documents_and_order(source, data_dir):
  data = TFDS("my_corpus", data_dir=data_dir)
  assert data.splits == source.splits == ("train", "test")
  for split in data.splits:
    assert list(data.documents(split)) == list(source.documents(split))


def test_names_may_have_versions_and_splits_may_be_parts(source, data_dir):
  data = TFDS("my_corpus:1.0.0", data_dir=data_dir, train="train[:90%]", validation="train[90%:]")
  documents = list(source.documents("train"))
  assert list(data.documents("train")) == documents[:180]
  assert list(data.documents("validation")) == documents[180:]
  assert data.fingerprint("train") != data.fingerprint("validation")


def test_a_prepared_set_trains_like_the_text_it_came_from(source, data_dir, tmp_path):
  batches = [
    next(
      TextDataset(origin, ByteTokenizer(), length=32, cache_dir=tmp_path).batches(
        "train", batch_size=4, seed=0
      )
    )["inputs"].tolist()
    for origin in (source, TFDS("my_corpus", data_dir=data_dir))
  ]
  assert batches[0] == batches[1]


def test_several_processes_prepare_at_once_without_tensorflow_or_network(corpus, tmp_path):
  command = [sys.executable, "-c", ALONE, str(corpus), str(tmp_path)]
  processes = [
    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert all("read 200" in out for out, _ in outputs)
  assert [path.name for path in (tmp_path / "my_corpus").iterdir()] == ["1.0.0"]


def test_other_text_does_not_overwrite_a_set_but_may_be_a_version(source, data_dir, tmp_path):
  (tmp_path / "b.txt").write_text("other text")
  other = LocalFiles(train=tmp_path / "b.txt")
  with pytest.raises(ValueError, match=r"1.0.0 holds a data set made from other text .* version="):
    prepare_tfds(other, name="my_corpus", data_dir=data_dir)
  prepare_tfds(other, name="my_corpus", data_dir=data_dir, version="0.9.0")
  data = TFDS("my_corpus:0.9.0", data_dir=data_dir)
  assert list(data.documents("train")) == ["other text"]
  newest = TFDS("my_corpus:1.0.0", data_dir=data_dir)
  assert newest.fingerprint("train")["made_from"] == source.fingerprint("train")


def test_what_is_not_prepared_says_how_to_prepare_it(tmp_path):
  for name in ("no_such_set", "mnist"):
    data = TextDataset(TFDS(name, data_dir=tmp_path), ByteTokenizer(), length=8)
    with pytest.raises(FileNotFoundError, match=f"no prepared data set '{name}' .* prepare_tfds"):
      data.targets("train")


def test_files_that_cannot_be_read_by_index_are_an_error(data_dir, tmp_path):
  shutil.copytree(data_dir / "my_corpus", tmp_path / "my_corpus")
  info = tmp_path / "my_corpus" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match=r"cannot be read by index: .* expected array_record files"):
    list(TFDS("my_corpus:1.0.0", data_dir=tmp_path).documents("train"))


def test_errors_name_feature_part_and_split(data_dir):
  with pytest.raises(ValueError, match="no feature 'body' — it has text — name one"):
    list(TFDS("my_corpus", data_dir=data_dir, text_feature="body").documents("train"))
  with pytest.raises(ValueError, match=r"'train\[:x\]' of my_corpus is not a part"):
    list(TFDS("my_corpus", data_dir=data_dir, train="train[:x]").documents("train"))
  with pytest.raises(ValueError, match="no split 'validation' — it has train, test"):
    list(TFDS("my_corpus", data_dir=data_dir).documents("validation"))
  with pytest.raises(TypeError, match="expected parts of the data set as strings"):
    TFDS("my_corpus", train=3)


@pytest.mark.parametrize(
  "changes, text",
  [({"name": "My-Corpus"}, "name='My-Corpus' — expected"), ({"version": "1"}, "version='1' —")],
)
def test_a_malformed_name_or_version_is_an_error(source, tmp_path, changes, text):
  with pytest.raises(ValueError, match=text):
    prepare_tfds(source, **{"name": "my_corpus", "data_dir": tmp_path, **changes})
