"""A classifier from a run file: trained, evaluated, drawn; and told from a language model."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import jax
import numpy as np
import pytest

from jaxmix import configuration
from jaxmix.training import train
from jaxmix.training.run import SUPPLIED, abstract_run

MODEL = """
import jax
from flax import nnx
from jaxmix.layers import Linear, SubspaceHead


class Tiny(nnx.Module):
  def __init__(self, image_shape, classes, *, rngs):
    height, width = image_shape
    self.hidden = Linear({"height": height, "width": width}, {"embed": 8}, rngs=rngs)
    self.head = SubspaceHead(8, classes, subspace_dim=2, rngs=rngs)

  def __call__(self, *, image, dropout_key=None):
    return self.head(jax.nn.silu(self.hidden(image)))

  def flops(self, batch, length):
    return batch * (self.hidden.flops_per_token + self.head.flops_per_feature)
"""
RUN_FILE = """
from jaxmix.data import IDXImages
from jaxmix.data import LabelledDataset
from jaxmix.objectives import classification_loss
from jaxmix.training import adamw
from jaxmix.training import cosine
from jaxmix.training import train
from jaxmix.training import with_subspaces
from tiny_classifier import Tiny

train.model = @Tiny
train.data = @LabelledDataset()
LabelledDataset.source = @IDXImages()
IDXImages.folder = "{folder}"
IDXImages.classes = 3
IDXImages.validation_examples = 20
train.objective = @classification_loss
train.optimizer = @with_subspaces
with_subspaces.optimizer = @adamw
with_subspaces.learning_rate = @subspaces/cosine()
subspaces/cosine.peak = 0.1
adamw.learning_rate = @cosine()
cosine.peak = 0.01
cosine.steps = 8
train.steps = 8
train.batch_size = 8
train.log_every = 2
train.evaluate_every = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, script):
  """(work directory, what the trainer printed) of a classifier of noise in three brightnesses."""
  folder = tmp_path_factory.mktemp("classifier")
  random = np.random.default_rng(0)
  for stem, count in (("train", 120), ("t10k", 30)):
    labels = random.integers(0, 3, count)
    images = random.integers(0, 60, (count, 4, 5)) + 90 * labels[:, None, None]
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
      header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
      (folder / f"{stem}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
  (folder / "tiny_classifier.py").write_text(MODEL)
  (folder / "run.gin").write_text(RUN_FILE.format(folder=folder))
  output = io.StringIO()
  sys.path.insert(0, str(folder))
  with contextlib.redirect_stdout(output):
    options = ["--gin_file", str(folder / "run.gin"), "--workdir", str(folder / "run")]
    assert script("train").main(options) == 0
  yield folder / "run", output.getvalue()
  sys.path.remove(str(folder))


def test_the_trainer_says_what_comes_next(run):
  workdir, text = run
  assert "100 examples in the training split" in text
  assert "evaluate.py" in text and "generate.py" not in text
  assert "subspaces/cosine.peak = 0.1" in (workdir / "config.gin").read_text()


def test_its_step_lowers_without_any_array(run):
  """The step that the trainer compiled: an outline says all that it needs of the data."""
  workdir, _ = run
  settings = configuration.load([workdir / "config.gin"], root=train, supplied=SUPPLIED)
  data, mesh = settings.value("data"), settings.value("mesh")()
  with jax.set_mesh(mesh):
    program, batch = abstract_run(settings, mesh, outline=data.outline)
    after, _ = jax.eval_shape(program.update, program.abstract_state(), batch)
  assert {name: x.shape for name, x in batch.items()} == {
    "image": (8, 4, 5),
    "label": (8,),
    "weights": (8,),
  }
  assert after["params"]["head"]["basis"].shape == (3, 2, 8)


def test_evaluation_reports_accuracy(run, script, capsys):
  workdir, _ = run
  evaluate = script("evaluate")
  options = ["--workdir", str(workdir), "--split", "test", "--batch_size", "16"]
  assert evaluate.main([*options, "--json"]) == 0
  row = json.loads(capsys.readouterr().out)
  assert list(row) == ["step", "split", "loss", "accuracy", "targets"]
  assert (row["step"], row["split"], row["targets"]) == (8, "test", 30)
  assert (30 * row["accuracy"]) % 1 == pytest.approx(0)
  assert evaluate.main(options) == 0
  assert capsys.readouterr().out == (
    f"step 8, test: accuracy {row['accuracy']:.2%}, loss {row['loss']:.4f} nats/example over 30 "
    "examples\n"
  )


def test_what_only_a_language_model_does_is_refused(run, script, capsys):
  workdir, _ = run
  assert script("generate").main(["--workdir", str(workdir), "--prompt", "a"]) == 1
  assert "holds a classifier, trained on a LabelledDataset — expected a language model" in (
    capsys.readouterr().err
  )
  assert script("evaluate").main(["--workdir", str(workdir), "--carry_state"]) == 1
  assert "a carried state through a LabelledDataset" in capsys.readouterr().err


def test_its_runs_are_drawn_by_accuracy(run, script, tmp_path):
  workdir, _ = run
  target = tmp_path / "runs.png"
  assert script("plot").main([str(workdir), "--output", str(target)]) == 0
  assert target.read_bytes().startswith(b"\x89PNG")
