"""How every script ends: which errors become a line, and which exit codes there are."""

from __future__ import annotations

import argparse
import shlex

import numpy as np
import pytest

from jaxmix.ops import attention


@pytest.fixture(scope="module")
def command_line(script):
  """launch/command_line.py as a module."""
  return script("command_line")


def ended(command_line, work, *, traceback: bool = False) -> int:
  return command_line.exit_code(work, argparse.Namespace(traceback=traceback))


def test_what_jaxmix_raises_is_the_users(command_line, capsys):
  assert ended(command_line, lambda _: attention(*[np.zeros(3)] * 3)) == 1
  errors = capsys.readouterr().err
  assert "error: attention: q, k, v have shapes (3,)" in errors and errors.count("\n") == 1


def test_what_the_system_refuses_is_the_users(command_line, tmp_path, capsys):
  assert ended(command_line, lambda _: (tmp_path / "absent").read_text()) == 1
  assert "No such file or directory" in capsys.readouterr().err


def test_what_other_code_raises_is_a_defect(command_line):
  def work(_):
    raise ValueError("from a file that is not of this project")

  with pytest.raises(ValueError, match="not of this project"):
    ended(command_line, work)


def test_a_bug_inside_jaxmix_is_a_defect(command_line):
  with pytest.raises(AttributeError):
    ended(command_line, lambda _: attention(None, None, None))


def test_an_interrupt_is_exit_code_130(command_line, capsys):
  def work(_):
    raise KeyboardInterrupt

  assert ended(command_line, work) == 130
  assert capsys.readouterr().err.endswith("interrupted\n")


def test_commands_can_be_pasted_whatever_the_names(command_line):
  words = shlex.split(
    command_line.command("train.py", "--workdir", "a run", "--gin_param", "x = 'y'")
  )
  assert words[2:] == ["--workdir", "a run", "--gin_param", "x = 'y'"]
