"""launch/scaling.py: a study that grows, piece by piece."""

from __future__ import annotations

import json

import pytest

from jaxmix.compile_ahead import installed


def test_nothing_to_tell(script, tmp_path, capsys):
  assert script("scaling").main(["--rows", str(tmp_path / "rows.json")]) == 1
  assert "has no rows, and none were compiled" in capsys.readouterr().err


def test_rows_are_added_and_drawn(script, tmp_path, capsys):
  """A step is compiled for a slice whose rows are cut over half a ring each, and read again."""
  if (reason := installed("tpu")) is not None:
    pytest.skip(reason)
  file, picture = tmp_path / "rows.json", tmp_path / "scaling.png"
  words = [
    *("--gin_file", "configs/runs/wikitext2_linear_attention_small.gin"),
    *("--gin_param", "Decoder.depth = 1", "--target", "v5e:4x4", "--length", "512"),
    *("--tokens_per_device", "256", "--vocab_size", "256", "--rows", str(file)),
  ]
  assert script("scaling").main(words) == 0
  assert script("scaling").main(["--rows", str(file), "--plot", str(picture)]) == 0
  assert "wikitext2_linear_attention_small  v5e:4x4" in capsys.readouterr().out
  (row,) = json.loads(file.read_text())
  assert row["rows"] == 8 and row["mesh"]["sequence"] == 2 and row["fits"]
  assert row["sent"]["collective-permute"] > 0
  assert picture.exists()
