"""launch/evaluate.py: the figures are those of a plain sum over the text."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.training.run import load_run


@pytest.fixture(scope="module")
def evaluate(script):
  """launch/evaluate.py as a module."""
  return script("evaluate")


@pytest.fixture(scope="module")
def run(trained):
  return load_run(trained.workdir)


def loss(run, inputs, targets, weights) -> float:
  """Mean loss by the logits of the whole array at once, each row by itself."""
  with jax.set_mesh(run.mesh):
    logits, _ = nnx.merge(run.graph, run.params)(jnp.asarray(inputs))
    log_p = jax.nn.log_softmax(logits, axis=-1)
  log_p = np.take_along_axis(np.asarray(log_p, np.float64), targets[..., None], axis=-1)[..., 0]
  return float(-np.sum(log_p * weights) / np.sum(weights))


def test_figures_are_those_of_every_token_of_the_split(evaluate, trained, run, capsys):
  assert evaluate.main(["--workdir", str(trained.workdir), "--json", "--batch_size", "16"]) == 0
  row = json.loads(capsys.readouterr().out)
  text = (trained.gin_file.parent / "validation.txt").read_text()
  tokens = np.append(run.data.tokenizer.encode(text), run.data.tokenizer.end_id)
  targets = len(tokens) - 1
  rows = next(run.data.epoch("validation", batch_size=100))
  expected = loss(run, rows["inputs"], rows["targets"], rows["weights"])
  assert (row["step"], row["split"], row["state"]) == (8, "validation", "fresh")
  assert row["targets"] == targets
  # A sum of float32 terms in another order: a few units in the last place.
  assert row["loss"] == pytest.approx(expected, rel=1e-5)
  assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
  bits = row["loss"] * targets / math.log(2) / len(text.encode())
  assert row["bits_per_byte"] == pytest.approx(bits)


def test_a_carried_state_reads_the_split_as_one_text(evaluate, trained, run, capsys):
  options = ["--workdir", str(trained.workdir), "--carry_state", "--batch_size", "1", "--json"]
  assert evaluate.main(options) == 0
  row = json.loads(capsys.readouterr().out)
  text = (trained.gin_file.parent / "validation.txt").read_text()
  tokens = np.append(run.data.tokenizer.encode(text), run.data.tokenizer.end_id)[None]
  expected = loss(run, tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape))
  assert row["state"] == "carried" and row["targets"] == tokens.size - 1
  assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_every_evaluation_is_noted_beside_the_run(evaluate, trained, capsys):
  options = ["--workdir", str(trained.workdir), "--step", "4", "--split", "train"]
  assert evaluate.main(options) == 0
  line = capsys.readouterr().out
  row = json.loads((trained.workdir / "evaluations.jsonl").read_text().splitlines()[-1])
  assert (row["step"], row["split"]) == (4, "train")
  assert line.startswith(f"step 4, train, fresh state: perplexity {row['perplexity']:.3f}, loss ")
  assert f"{row['bits_per_byte']:.4f} bits/byte over {row['targets']:,} tokens" in line


@pytest.mark.parametrize(
  "options, text",
  [
    (["--split", "test"], "LocalFiles has no split 'test' — it has train, validation"),
    (["--batch_size", "0"], "batch_size=0 — expected a whole number of at least 1"),
    (["--carry_state", "--batch_size", "0"], "batch_size=0 — expected"),
    (["--step", "5"], "no checkpoint of step 5 in"),
    (["--gin_param", "make_mesh.data = 3"], "'make_mesh' is not imported"),
    (["--workdir", "/nowhere"], "no run in /nowhere: there is no such folder"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_1(evaluate, trained, capsys, options, text):
  assert evaluate.main(["--workdir", str(trained.workdir), *options]) == 1
  errors = capsys.readouterr().err
  assert text in errors
  assert errors.count("\n") == 1
