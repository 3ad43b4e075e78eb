"""What the README shows, works."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from jaxmix import configuration
from jaxmix.training import train
from jaxmix.training.run import SUPPLIED


@pytest.fixture(scope="module")
def blocks(repository):
  """Language -> the code blocks of the README in it."""
  found: dict[str, list[str]] = {}
  pattern = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
  for language, text in pattern.findall((repository / "README.md").read_text()):
    found.setdefault(language, []).append(text)
  return found


@pytest.fixture(scope="module")
def commands(blocks):
  """Every command of the README as a list of words, loops turn by turn."""
  text = "".join(blocks["bash"]).replace("\\\n", " ")

  def turns(loop):
    name, words, body = loop.groups()
    return "".join(re.sub(rf"\${{?{name}}}?", word, body) for word in words.split())

  text = re.sub(r"^for (\w+) in ([^;]+); do\n(.*?)^done$", turns, text, flags=re.M | re.S)
  lines = (shlex.split(line, comments=True) for line in text.splitlines())
  return [line for line in lines if line]


def test_python_blocks_run(blocks):
  assert len(blocks["python"]) >= 3
  for block in blocks["python"]:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_scripts_exist_and_take_the_options_shown(commands, repository, monkeypatch):
  monkeypatch.syspath_prepend(str(repository / "launch"))
  checked = 0
  for command in commands:
    scripts = [word for word in command if word.startswith("launch/")]
    for script in scripts:
      assert (repository / script).is_file(), f"the README shows {script}"
    if scripts and scripts[0].endswith(".py"):
      spec = importlib.util.spec_from_file_location("readme_script", repository / scripts[0])
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      words = command[command.index(scripts[0]) + 1 :]
      module.options().parse_args(words)
      checked += 1
      if scripts[0] == "launch/train.py":
        arguments = module.options().parse_args(words)
        configuration.load(
          [repository / name for name in arguments.gin_file],
          arguments.gin_param,
          root=train,
          supplied=SUPPLIED,
        )
  assert checked >= 6


def test_help_is_a_manual(repository):
  for script in ("train.py", "evaluate.py", "generate.py", "benchmark.py"):
    done = subprocess.run(
      [sys.executable, repository / "launch" / script, "--help"],
      capture_output=True,
      text=True,
      check=True,
    )
    assert "examples:" in done.stdout, script
    assert "exit codes:" in done.stdout, script
