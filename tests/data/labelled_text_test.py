"""Labelled sentences from tables: small tasks of GLUE, rows in the form of BERT, errors."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmix.data import ByteTokenizer, LabelledDataset, LabelledText, WordPiece

# task -> files, columns, labels, examples of each split, share of class 1 in training
TASKS = {
  "sst2": (("train.tsv", "dev.tsv"), {"text": 0, "label": 1}, (6_920, 872), 0.52),
  "cola": (
    ("in_domain_train.tsv", ["in_domain_dev.tsv", "out_of_domain_dev.tsv"]),
    {"text": 3, "label": 1},
    (8_551, 1_043),
    0.704,
  ),
  "rte": (
    ("train.tsv", "dev.tsv"),
    {
      "text": "sentence1",
      "second": "sentence2",
      "label": "label",
      "labels": ("entailment", "not_entailment"),
    },
    (2_490, 277),
    0.498,
  ),
  "mrpc": (
    ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"),
    {"text": "#1 String", "second": "#2 String", "label": "Quality"},
    (4_076, 1_725),
    0.675,
  ),
}


@pytest.mark.parametrize("task", TASKS)
def test_glue(task, shared):
  files, columns, counts, share = TASKS[task]
  folder = shared / "data" / "glue-small" / task
  paths = [
    [folder / name for name in each] if isinstance(each, list) else folder / each for each in files
  ]
  vocabulary = WordPiece(shared / "data" / "vocab" / "bert-base-uncased" / "vocab.txt")
  data = LabelledDataset(LabelledText(*paths, tokenizer=vocabulary, length=64, **columns))
  assert (data.targets("train"), data.targets("validation")) == counts
  batch = next(data.epoch("train", batch_size=counts[0]))
  assert abs(batch["label"].mean() - share) < 0.01
  assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
    **data.outline.row,
    "weights": ((), np.float32),
  }
  lengths = batch["segment_ids"].sum(1)
  assert (batch["tokens"][:, 0] == 101).all()
  assert (batch["tokens"][np.arange(counts[0]), lengths - 1] == 102).all()
  assert ((batch["tokens"] == 102).sum(1) == 1 + ("second" in columns)).all()
  assert batch["token_types"].max() == ("second" in columns)


def table(folder, content: str, **options) -> LabelledText:
  (folder / "t.tsv").write_bytes(content.encode("utf-8", "surrogateescape"))
  options = {"text": 0, "label": 1, **options}
  return LabelledText(folder / "t.tsv", tokenizer=ByteTokenizer(), **{"length": 10, **options})


def test_longer_text_is_cut_first(tmp_path):
  source = table(tmp_path, "abcdefgh\t1\txy\nab\t0\tx\n", second=2, start_id=1, end_id=2)
  first, second = source.rows("train")[0], source.rows("train")[1]
  assert first["tokens"].tolist() == [1, *b"abcde", 2, *b"xy", 2]
  assert first["token_types"].tolist() == [0] * 7 + [1] * 3
  assert second["tokens"].tolist() == [1, *b"ab", 2, *b"x", 2, 0, 0, 0, 0]
  assert second["segment_ids"].tolist() == [1] * 6 + [0] * 4
  assert (first["label"], second["label"]) == (1, 0)


@pytest.mark.parametrize(("content", "options", "message"), [
  ("a\t2\n", {}, "line 1: the label '2' is unknown — expected one of 0, 1"),
  ("a\t1\nb\n", {}, "line 2: 1 columns: 'b' — expected at least 2"),
  ("\t1\n", {}, "line 1: the sentence '' has no tokens"),
  ("x\ty\na\t1\n", {"text": "x", "label": "z"}, "columns are x, y — expected z among them"),
  ("x\ty\n", {"text": "x", "label": "y"}, "holds no examples"),
  ("a\udcff\t1\n", {}, "byte 1 is not UTF-8"),
  ("a\t1\tb\n", {"second": 2, "length": 4}, "length=4 — expected a whole number of at least 5"),
  ("a\t1\n", {"text": "x"}, "expected all by name or all by number"),
])  # fmt: skip
def test_errors(tmp_path, content, options, message):
  with pytest.raises(ValueError, match=message):
    table(tmp_path, content, **options).rows("train")
