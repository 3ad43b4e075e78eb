"""launch/shard.py: what it prints is a run file that reads the same text by shards."""

from __future__ import annotations

import textwrap

from jaxmix import configuration
from jaxmix.training import train
from jaxmix.training.run import SUPPLIED


def test_what_it_prints_reads_the_same_text(script, trained, tmp_path, capsys):
  files = ["--gin_file", str(trained.gin_file)]
  lines = ["--gin_param", 'LocalFiles.document = "line"']
  target = ["--shards", "4", "--name", "sentences", "--data_dir", str(tmp_path)]
  assert script("shard").main([*files, *lines, *target]) == 0
  _, _, printed = capsys.readouterr().out.partition("to read it:\n")
  (tmp_path / "shards.gin").write_text(
    f'include "{trained.gin_file}"\nfrom jaxmix.data import TextDataset\n{textwrap.dedent(printed)}'
  )
  before, after = (
    configuration.load([path], params, root=train, supplied=SUPPLIED).value("data")
    for path, params in ((trained.gin_file, lines[1:]), (tmp_path / "shards.gin", ()))
  )
  assert after.readers == len(after.source.shards("train")) == 4
  for split in ("train", "validation"):
    assert list(after.source.documents(split)) == list(before.source.documents(split))
  assert next(after.batches("train", batch_size=4, seed=0))["inputs"].shape == (4, 32)


def test_what_is_not_one_text_is_refused(script, shared, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("JAXMIX_DATA", str(shared / "data"))
  target = ["--shards", "4", "--name", "sentences", "--data_dir", str(tmp_path)]
  run = "configs/runs/wiki_shakespeare_linear_attention_1m.gin"
  assert script("shard").main(["--gin_file", run, *target]) == 1
  assert "reads a Mixture — expected a TextDataset" in capsys.readouterr().err
