"""The whole trainer: real processes that are killed, and what a run leaves behind."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxmix import sharding
from jaxmix.data import ByteTokenizer, LocalFiles, TextDataset
from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder, abstract_parameters
from jaxmix.training import adamw, train
from jaxmix.training.checkpoints import Checkpoints
from jaxmix.training.metrics import NonFiniteLoss, batch_fingerprint

STEPS = 24
RUN_FILE = """
from jaxmix.data import ByteTokenizer
from jaxmix.data import LocalFiles
from jaxmix.data import TextDataset
from jaxmix.mixers import Attention
from jaxmix.mixers import LinearAttention
from jaxmix.models import Decoder
from jaxmix.training import adamw
from jaxmix.training import train

train.model = @Decoder
Decoder.dim = 32
Decoder.depth = 2
Decoder.pattern = ("linear_attention", "attention")
Decoder.mixers = {{"linear_attention": @LinearAttention, "attention": @Attention}}
Decoder.dropout_rate = 0.1
LinearAttention.heads = 2
Attention.heads = 2
train.data = @TextDataset()
TextDataset.source = @LocalFiles()
TextDataset.tokenizer = @ByteTokenizer()
TextDataset.length = 32
TextDataset.cache_dir = "{folder}/cache"
LocalFiles.train = "{folder}/train.txt"
LocalFiles.validation = "{folder}/validation.txt"
train.optimizer = @adamw
adamw.learning_rate = 0.003
train.steps = {steps}
train.batch_size = 8
train.log_every = 1
train.evaluate_every = 0
train.checkpoint_every = 4
train.keep = 2
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder with train.txt and validation.txt: 400 and 40 short documents of digits."""
  folder = tmp_path_factory.mktemp("corpus")
  random = np.random.default_rng(0)
  for split, count in (("train", 400), ("validation", 40)):
    numbers = (random.integers(0, 10**6, random.integers(2, 12)) for _ in range(count))
    text = "\n\n".join(" ".join(map(str, line)) for line in numbers)
    (folder / f"{split}.txt").write_text(text)
  return folder


@pytest.fixture(scope="module")
def run(corpus, repository):
  """Starts launch/train.py on the corpus in a process of its own."""
  run_file = corpus / "run.gin"
  run_file.write_text(RUN_FILE.format(folder=corpus, steps=STEPS))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  environment["JAX_COMPILATION_CACHE_DIR"] = str(corpus / "compiled")

  def start(workdir) -> subprocess.Popen:
    command = [sys.executable, "launch/train.py", "--gin_file", run_file, "--workdir", workdir]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=repository, env=environment, **pipes)

  return start


def _lines(workdir, split="train"):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line for line in lines if line["split"] == split}


def _losses(workdir):
  return {step: (line["loss"], line["gradient_norm"]) for step, line in _lines(workdir).items()}


def _wait(process, condition, what):
  deadline = time.monotonic() + 120
  while not condition():
    if process.poll() is not None:
      pytest.fail(f"the run ended before {what}:\n{process.stdout.read()}")
    if time.monotonic() > deadline:
      process.kill()
      pytest.fail(f"no {what} within two minutes:\n{process.stdout.read()}")
    time.sleep(0.001)


def test_killed_and_interrupted_run_equals_the_run_that_was_not(run, settings, tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  process = run(whole)
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output

  process = run(broken)
  half_written = lambda: list(broken.glob("checkpoints/*.orbax-checkpoint-tmp*"))  # noqa: E731
  _wait(process, (broken / "checkpoints" / "4").exists, "a first checkpoint")
  _wait(process, half_written, "a save under way")
  process.kill()
  output, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL, output

  process = run(broken)
  _wait(process, lambda: 16 in _losses(broken), "step 16")
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 75, output
  assert "SIGTERM" in output
  assert max(_losses(broken)) < STEPS

  process = run(broken)
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  assert _losses(broken) == _losses(whole)  # every step, every digit
  assert list(_losses(broken)) == list(range(1, STEPS + 1))

  model = settings["model"]
  _, parameters, _ = abstract_parameters(functools.partial(model, ByteTokenizer().vocab_size))
  finals = []
  for workdir in (whole, broken):
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    finals.append(checkpoints.restore_parameters(STEPS, parameters))
  for left, right in zip(*map(jax.tree.leaves, finals), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.fixture
def settings(corpus):
  """Arguments of a tiny run for `train`."""
  mixers = {
    "linear_attention": functools.partial(LinearAttention, heads=2),
    "attention": functools.partial(Attention, heads=2),
  }
  return {
    "model": functools.partial(
      Decoder, dim=32, depth=2, pattern=("linear_attention", "attention"), mixers=mixers
    ),
    "data": TextDataset(
      LocalFiles(train=str(corpus / "train.txt"), validation=str(corpus / "validation.txt")),
      ByteTokenizer(),
      length=32,
      cache_dir=corpus / "cache",
    ),
    "optimizer": functools.partial(adamw, learning_rate=3e-3),
    "mesh": functools.partial(sharding.make_mesh, devices=jax.devices()[:1]),
    "steps": 6,
    "batch_size": 8,
    "log_every": 1,
    "evaluate_every": 3,
    "checkpoint_every": 2,
  }


def test_a_run_leaves_metrics_plot_config_and_checkpoints(settings, tmp_path):
  result = train(tmp_path, **settings, config="text of the run")
  assert (result.step, result.interrupted) == (6, None)
  assert list(_lines(tmp_path)) == [1, 2, 3, 4, 5, 6]
  assert list(_lines(tmp_path, "validation")) == [3, 6]
  last = _lines(tmp_path)[6]
  assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
  bytes_per_target = settings["data"].bytes_per_target("train")
  assert last["bits_per_byte"] == pytest.approx(last["loss"] / np.log(2) / bytes_per_target)
  assert last["tokens_per_second"] > 0
  assert "mfu" not in last, "the peak of a CPU is not known"
  held_out = _lines(tmp_path, "validation")[6]
  assert held_out["targets"] == settings["data"].targets("validation")
  assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "config.gin").read_text() == "text of the run"
  checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
  assert checkpoints.latest_step() == 6
  assert checkpoints.config(6) == "text of the run"


def test_a_finished_run_is_left_as_it_is(settings, tmp_path):
  train(tmp_path, **settings)
  before = (tmp_path / "metrics.jsonl").read_text()
  assert train(tmp_path, **settings).step == 6
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_over_another_mesh_with_the_same_losses(settings, tmp_path):
  if jax.device_count() < 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
  train(tmp_path / "one", **settings)
  train(tmp_path / "two", **{**settings, "steps": 3})
  cut = functools.partial(sharding.make_mesh, data=1, fsdp=2, tensor=2, sequence=2)
  train(tmp_path / "two", **{**settings, "mesh": cut})
  one, two = (_losses(tmp_path / name) for name in ("one", "two"))
  assert list(one) == list(two)
  np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)  # float32, 6 steps


def test_rows_that_do_not_cut_evenly_are_refused(settings, tmp_path):
  cut = functools.partial(sharding.make_mesh, data=1, sequence=5, devices=jax.devices()[:5])
  with pytest.raises(ValueError, match=r"rows of length=32 do not cut .* TextDataset.length = 35"):
    train(tmp_path, **{**settings, "mesh": cut})


def test_the_average_of_the_parameters_is_what_is_evaluated(settings, tmp_path):
  settings |= {"evaluate_every": 0, "steps": 4}
  plain = train(tmp_path / "plain", **settings).validation["loss"]
  slow = train(tmp_path / "slow", **settings, ema_decay=0.999).validation["loss"]
  assert _losses(tmp_path / "plain") == _losses(tmp_path / "slow")
  assert slow > plain, "an average over few steps is still near the initial parameters"


def test_a_loss_that_is_not_finite_stops_the_run(settings, tmp_path):
  class Poisoned(Decoder):
    """A decoder whose features are NaN for every batch."""

    def features(self, tokens, **options):
      features, state = super().features(tokens, **options)
      return features * np.nan, state

  settings |= {"evaluate_every": 0, "log_every": 2}
  train(tmp_path, **{**settings, "steps": 2})
  poisoned = functools.partial(Poisoned, *settings["model"].args, **settings["model"].keywords)
  with pytest.raises(NonFiniteLoss) as failure:
    train(tmp_path, **{**settings, "model": poisoned})
  message = str(failure.value)
  assert "the loss of step 3 is nan" in message
  assert str(tmp_path / "checkpoints" / "2") in message
  batches = settings["data"].batches("train", batch_size=8, seed=0)
  third = [next(batches) for _ in range(3)][-1]
  assert batch_fingerprint(third) in message
  assert Checkpoints(tmp_path / "checkpoints", read_only=True).latest_step() == 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 4}, "batch_size was 8, is 4"),
    ({"seed": 1}, "seed was 0, is 1"),
  ],
)
def test_a_run_does_not_go_on_with_other_data(settings, tmp_path, change, message):
  train(tmp_path, **{**settings, "steps": 2})
  with pytest.raises(ValueError, match=message):
    train(tmp_path, **{**settings, **change})


def test_counts_below_one_are_refused(settings, tmp_path):
  with pytest.raises(ValueError, match="train: log_every=0, expected at least 1"):
    train(tmp_path, **{**settings, "log_every": 0})
