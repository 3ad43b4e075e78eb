"""launch/plot.py: one picture of several runs."""

from __future__ import annotations


def test_picture_of_a_run(script, trained, tmp_path, capsys):
  plot = script("plot")
  target = tmp_path / "comparison.png"
  assert plot.main([str(trained.workdir), "--output", str(target)]) == 0
  assert capsys.readouterr().out.strip() == str(target)
  assert target.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run(script, tmp_path, capsys):
  plot = script("plot")
  assert plot.main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
  assert "expected the file that a trainer writes" in capsys.readouterr().err
