"""Local files: what is found, how it is cut into documents, and what the errors say."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re

import pytest

from jaxmix.data import LocalFiles, SplitFiles

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def documents(source, split="train"):
  return list(source.documents(split))


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_text_reads_as_unpacked_text(tmp_path, suffix):
  text = (
    "première ligne\nsecond 🙂\r\n" * 100_000
  )  # longer than one chunk, with cuts inside characters
  path = tmp_path / f"corpus.txt{suffix}"
  path.write_bytes(PACKERS[suffix](text.encode()))
  assert documents(LocalFiles(train=path)) == [text]


@pytest.mark.parametrize("suffix", PACKERS)
def test_json_lines_give_a_document_a_record(tmp_path, suffix):
  records = [{"text": "one\ntwo", "id": 1}, {"text": "drei ü", "id": 2}]
  content = "\n".join(json.dumps(record) for record in records) + "\n\n"
  path = tmp_path / f"corpus.jsonl{suffix}"
  path.write_bytes(PACKERS[suffix](content.encode()))
  assert documents(LocalFiles(train=path)) == ["one\ntwo", "drei ü"]


def test_a_document_is_a_file_a_line_or_a_paragraph(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes("a b\nc\u2028d\r\n \n\n e\nf\n".encode())
  assert documents(LocalFiles(train=path)) == ["a b\nc\u2028d\r\n \n\n e\nf\n"]
  assert documents(LocalFiles(train=path, document="line")) == ["a b", "c\u2028d", " e", "f"]
  assert documents(LocalFiles(train=path, document="paragraph")) == ["a b\nc\u2028d", " e\nf"]


def test_lists_globs_and_folders_are_read_in_order(tmp_path):
  for name in ("b.txt", "a.txt", "deep/c.txt", "deep/.hidden.txt", ".git/config"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  assert documents(LocalFiles(train=tmp_path)) == ["a.txt", "b.txt", "deep/c.txt"]
  assert documents(LocalFiles(train=f"{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
  everything = documents(LocalFiles(train=f"{tmp_path}/**/*.txt"))
  assert everything == ["a.txt", "b.txt", "deep/c.txt"]
  listed = LocalFiles(train=[tmp_path / "b.txt", f"{tmp_path}/a*"])
  assert documents(listed) == ["b.txt", "a.txt"]


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("here")
  monkeypatch.chdir(tmp_path)
  assert documents(LocalFiles(train="a.txt")) == ["here"]


def test_replacements_are_literal_and_encodings_are_obeyed(tmp_path):
  (tmp_path / "a.txt").write_bytes("é <unk> .* <unk>".encode("latin-1"))
  source = LocalFiles(
    train=tmp_path / "a.txt", encoding="latin-1", replace={"<unk>": "[UNK]", ".*": "!"}
  )
  assert documents(source) == ["é [UNK] ! [UNK]"]


def test_the_fingerprint_follows_content_and_reading_but_not_place_or_time(tmp_path):
  for folder in ("one", "two"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.txt").write_text("same")
  os.utime(tmp_path / "two" / "a.txt", (1, 1))
  first = LocalFiles(train=tmp_path / "one" / "a.txt").fingerprint("train")
  assert first == LocalFiles(train=tmp_path / "two" / "a.txt").fingerprint("train")
  assert json.loads(json.dumps(first)) == first
  by_line = LocalFiles(train=tmp_path / "one" / "a.txt", document="line").fingerprint("train")
  assert by_line != first
  (tmp_path / "one" / "a.txt").write_text("sane")
  assert LocalFiles(train=tmp_path / "one" / "a.txt").fingerprint("train") != first


def test_cuts_at_bytes_give_the_whole_corpus_once(tmp_path):
  (tmp_path / "a.txt").write_text("abcdef")
  (tmp_path / "b.txt").write_text("ghij")
  source = SplitFiles(tmp_path, validation_start=4, test_start=8)
  assert [documents(source, split) for split in source.splits] == [
    ["abcd"],
    ["ef", "gh"],
    ["ij"],
  ]
  two = SplitFiles(tmp_path, validation_start=6)
  assert [documents(two, split) for split in two.splits] == [["abcdef"], ["ghij"]]
  assert two.fingerprint("train") != two.fingerprint("validation")


def test_tiny_shakespeare_splits_as_the_field_does(shared):
  path = shared / "data" / "tiny-shakespeare" / "input.txt"
  source = SplitFiles(path, validation_start=1_003_854, test_start=1_059_624)
  texts = [documents(source, split) for split in source.splits]
  assert [len(text) for (text,) in texts] == [1_003_854, 55_770, 55_770]
  assert "".join(text for (text,) in texts).encode() == path.read_bytes()


def test_a_cut_inside_a_character_is_an_error(tmp_path):
  (tmp_path / "a.txt").write_text("aé" + "b" * 10)
  source = SplitFiles(tmp_path / "a.txt", validation_start=2)
  with pytest.raises(ValueError, match="must be cut between characters"):
    documents(source, "train")
  with pytest.raises(ValueError, match=r"byte 2 .* must be cut between characters"):
    documents(source, "validation")


@pytest.mark.parametrize(
  "cuts, error",
  [((0, None), ValueError), ((5, 5), ValueError), ((7, 3), ValueError), (("4", None), TypeError)],
)
def test_cuts_out_of_order_are_errors(cuts, error):
  with pytest.raises(error, match=re.escape(f"validation_start={cuts[0]!r}")):
    SplitFiles("a.txt", validation_start=cuts[0], test_start=cuts[1])


def test_json_lines_cannot_be_cut_at_a_byte(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "a"}')
  with pytest.raises(ValueError, match="JSON lines, which cannot be cut"):
    documents(SplitFiles(tmp_path, validation_start=4))


@pytest.mark.parametrize(
  "given, reason",
  [
    ("absent.txt", "does not exist"),
    ("*.text", "is a glob that matches no file"),
    ("empty", "is a folder without files"),
  ],
)
def test_missing_files_are_named(tmp_path, given, reason):
  (tmp_path / "empty").mkdir()
  source = LocalFiles(train=tmp_path / given)
  with pytest.raises(FileNotFoundError, match=re.escape(f"{given} {reason}")):
    documents(source)
  with pytest.raises(FileNotFoundError, match=re.escape(f"{given} {reason}")):
    source.fingerprint("train")


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_a_split_without_text_is_an_error(tmp_path, content):
  (tmp_path / "a.txt").write_text(content)
  with pytest.raises(ValueError, match=r"split 'train' \(.*a.txt\) holds no text"):
    documents(LocalFiles(train=tmp_path / "a.txt"))
  with pytest.raises(ValueError, match=r"split 'test', bytes 9 to the end of .* holds no text"):
    documents(SplitFiles(tmp_path, validation_start=8, test_start=9), "test")


def test_undecodable_bytes_name_file_byte_and_repair(tmp_path):
  place = 3_000_000  # in the third chunk, after characters of two bytes
  (tmp_path / "a.txt").write_bytes("é".encode() * (place // 2) + b"\xff" + b"text")
  expected = rf'a\.txt: byte {place} \(0xff\) does not decode as utf-8 .* encoding="latin-1"'
  for document in ("file", "line", "paragraph"):
    with pytest.raises(ValueError, match=expected):
      documents(LocalFiles(train=tmp_path / "a.txt", document=document))


@pytest.mark.parametrize(
  "line",
  ["not json", '{"body": "x"}', '["x"]', '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}'],
)
def test_a_bad_json_line_names_file_and_line(tmp_path, line):
  (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .* expected one JSON object a line"):
    documents(LocalFiles(train=tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", ["plain", "truncated"])
def test_a_damaged_packed_file_is_named(tmp_path, suffix, damage):
  packed = PACKERS[suffix](os.urandom(1000))
  content = b"plain text" if damage == "plain" else packed[: len(packed) // 2]
  (tmp_path / f"a.txt{suffix}").write_bytes(content)
  with pytest.raises(ValueError, match=rf"a\.txt\{suffix} does not unpack"):
    documents(LocalFiles(train=tmp_path))


@pytest.mark.parametrize(
  "arguments, error, text",
  [
    ({}, ValueError, "given no files"),
    ({"train": 3}, TypeError, "train=3 of type int"),
    ({"train": []}, ValueError, "names no file"),
    ({"train": [None]}, TypeError, "list of these"),
    ({"train": "a", "document": "word"}, ValueError, "expected one of file, line, paragraph"),
    ({"train": "a", "encoding": "utf-99"}, ValueError, "encoding='utf-99' is unknown"),
    ({"train": "a", "replace": "<unk>"}, TypeError, "expected text to text"),
    ({"train": "a", "text_field": None}, TypeError, "text_field=None"),
  ],
)
def test_wrong_arguments_are_errors_at_once(arguments, error, text):
  with pytest.raises(error, match=text):
    LocalFiles(**arguments)


def test_an_unknown_split_lists_those_that_exist(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  source = LocalFiles(train=tmp_path, test=tmp_path)
  with pytest.raises(ValueError, match="no split 'validation' — it has train, test"):
    documents(source, "validation")
