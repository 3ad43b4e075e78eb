"""launch/trajectory.py: a text's path on the Grassmann manifold."""

from __future__ import annotations

import re


def test_picture_of_a_text(script, trained, tmp_path, capsys):
  target = tmp_path / "trajectory.png"
  options = ["--workdir", str(trained.workdir), "--output", str(target)]
  assert script("trajectory").main([*options, "--text", "The old cat sat."]) == 0
  line, path = capsys.readouterr().out.strip().splitlines()
  assert re.fullmatch(r"layer 1, offset 1: mean angles [0-9.]+ and [0-9.]+ degrees", line)
  assert path == str(target) and target.read_bytes().startswith(b"\x89PNG")


def test_text_of_the_validation_split(script, trained, tmp_path, capsys):
  target = tmp_path / "trajectory.png"
  options = ["--workdir", str(trained.workdir), "--output", str(target), "--tokens", "12"]
  assert script("trajectory").main(options) == 0
  assert target.is_file() and "layer 1" in capsys.readouterr().out


def test_layers_without_planes(script, trained, tmp_path, capsys):
  options = ["--workdir", str(trained.workdir), "--output", str(tmp_path / "x.png")]
  assert script("trajectory").main([*options, "--layer", "0"]) == 1
  assert "--layer 0 is no Grassmann layer — expected one of 1" in capsys.readouterr().err
