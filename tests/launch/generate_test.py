"""launch/generate.py: the text is that of the tokens, and it appears as they are made."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
import subprocess
import sys

import jax
import pytest

from jaxmix import inference
from jaxmix.mixers import MonarchMixer
from jaxmix.models import Decoder, abstract_parameters, init_parameters
from jaxmix.training.run import load_run


@pytest.fixture(scope="module")
def generate(script):
  """launch/generate.py as a module."""
  return script("generate")


@pytest.fixture
def call(generate, trained, capsys):
  """Calls the script on the trained run; returns what it printed. It must succeed."""

  def printed(*options: str) -> str:
    given = ["--workdir", str(trained.workdir), "--max_new_tokens", "20", *options]
    assert generate.main(given) == 0
    return capsys.readouterr().out

  return printed


def test_the_text_is_the_prompt_and_what_its_tokens_spell(call, trained):
  run = load_run(trained.workdir)
  tokenizer = run.data.tokenizer
  prompts = ["The old", "é", ""]
  ids = [tokenizer.encode(prompt) for prompt in prompts]
  options = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "seed": 7}
  flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
  with jax.set_mesh(run.mesh):
    steps = list(
      inference.generate(
        run.graph, run.params, ids, max_new_tokens=20, end_id=tokenizer.end_id, **options
      )
    )
  made = [[step[row] for step in steps if step[row] is not None] for row in range(3)]
  texts = [
    prompt + tokenizer.decode([*prompt_ids, *tokens])[len(prompt) :]
    for prompt, prompt_ids, tokens in zip(prompts, ids, made, strict=True)
  ]
  expected = "".join(f"--- {row + 1} of 3 ---\n{text}\n" for row, text in enumerate(texts))
  assert call(*flags, *(word for prompt in prompts for word in ("--prompt", prompt))) == expected


def test_a_prompt_may_come_on_standard_input_without_its_last_line_break(call, monkeypatch):
  text = call("--prompt", "two\nlines", "--temperature", "0")
  stdin = io.TextIOWrapper(io.BytesIO(b"two\nlines\n"))
  monkeypatch.setattr(sys, "stdin", stdin)
  assert call("--temperature", "0") == text
  assert text.startswith("two\nlines")


def test_text_is_written_as_it_is_made(generate, trained, monkeypatch):
  flushed = []

  class Terminal(io.TextIOWrapper):
    def flush(self):
      super().flush()
      flushed.append(self.buffer.getvalue().decode())

  terminal = Terminal(io.BytesIO(), encoding="utf-8", write_through=True)
  monkeypatch.setattr(sys, "stdout", terminal)
  options = ["--workdir", str(trained.workdir), "--prompt", "The", "--max_new_tokens", "12"]
  assert generate.main([*options, "--temperature", "0"]) == 0
  seen = [text for text in dict.fromkeys(flushed) if text]
  assert seen[0] == "The"
  assert len(seen) > 6, "the text came in few pieces"


def test_stats_are_told_apart_from_the_text(generate, trained, capsys):
  options = ["--workdir", str(trained.workdir), "--prompt", "a", "--prompt", "b", "--stats"]
  assert generate.main([*options, "--max_new_tokens", "5", "--temperature", "0"]) == 0
  stats = capsys.readouterr().err
  pattern = (
    r"first token after [\d.]+ s, with compilation; "
    r"then 4 steps of ([\d.]+) ms, ([\d.]+) tokens/s\n"
  )
  milliseconds, rate = map(float, re.fullmatch(pattern, stats).groups())
  assert rate == pytest.approx(2 / (milliseconds / 1e3), rel=0.1)  # both are rounded for print


def test_long_convolutions_go_on_as_modes(generate, trained, monkeypatch, capsys):
  """The text is that of the distilled model, and the errors of its layers stand on stderr."""
  run = load_run(trained.workdir)
  mixer = functools.partial(MonarchMixer, max_length=64, hidden=8, sines=2)
  model = functools.partial(
    Decoder, run.data.tokenizer.vocab_size, 16, 2, pattern=("monarch",), mixers={"monarch": mixer}
  )
  params = jax.jit(lambda: init_parameters(model, jax.random.key(0)))()
  run = dataclasses.replace(run, graph=abstract_parameters(model)[0], params=params)
  monkeypatch.setattr(generate.command_line, "open_run", lambda arguments: run)
  options = ["--workdir", "monarch", "--prompt", "The", "--temperature", "0", "--modes", "4"]
  assert generate.main([*options, "--max_new_tokens", "12"]) == 0
  text, told = capsys.readouterr()
  graph, params, errors = inference.distill_filters(run.graph, params, modes=4)
  tokenizer = run.data.tokenizer
  ids = tokenizer.encode("The")
  steps = inference.generate(
    graph, params, [ids], max_new_tokens=12, temperature=0, end_id=tokenizer.end_id
  )
  assert text == tokenizer.decode([*ids, *(token for (token,) in steps)]) + "\n"
  worst = [f"{100 * errors[layer]['gated'].relative.max():.2f}" for layer in (0, 1)]
  pattern = (
    r"layer (\d), gated filters: off by [\d.]+% .*, ([\d.]+)% in the worst; by .* at a lag\n"
  )
  assert re.fullmatch(2 * pattern, told).groups() == ("0", worst[0], "1", worst[1])


@pytest.mark.parametrize(
  "options, text",
  [
    (["--prompt", "a", "--modes", "4"], "expected a Monarch mixer among them"),
    (["--prompt", "a", "--top_p", "2"], "top_p=2.0 — expected a probability"),
    (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens=0 — expected at least 1"),
    (["--prompt", "a\udcff"], "the prompt is not UTF-8: byte 1 is 0xff"),
    (["--prompt", "a", "--step", "77"], "no checkpoint of step 77"),
    (["--prompt", "a", "--workdir", "/nowhere"], "no run in /nowhere"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(generate, trained, capsys, options, text):
  assert generate.main(["--workdir", str(trained.workdir), *options]) == 1
  errors = capsys.readouterr().err
  assert text in errors
  assert errors.count("\n") == 1


def test_a_reader_that_leaves_ends_it_quietly(repository, trained):
  command = [sys.executable, str(repository / "launch" / "generate.py"), "--prompt", "The cat"]
  options = ["--workdir", str(trained.workdir), "--max_new_tokens", "100000"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  process = subprocess.Popen(
    [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  assert process.stdout.read(3) == b"The"
  process.stdout.close()
  assert process.wait(timeout=60) == 141
  assert process.stderr.read() == b""
  process.stderr.close()
