"""A classifier of texts that begins with the encoder of a masked language model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxmix.configuration import load
from jaxmix.training import train
from jaxmix.training.run import SUPPLIED, load_run
from jaxmix.training.warm_start import from_run

ENCODER = """
from jaxmix.data import ByteTokenizer
from jaxmix.mixers import MonarchMixer
from jaxmix.models import Encoder
from jaxmix.sharding import make_mesh
from jaxmix.training import adamw
from jaxmix.training import train
Encoder.dim = 8
Encoder.depth = 1
Encoder.mlp = "gated_block_diagonal"
Encoder.mlp_dim = 16
Encoder.pattern = ("monarch",)
Encoder.mixers = {"monarch": @MonarchMixer}
MonarchMixer.visibility = "full"
MonarchMixer.max_length = 16
MonarchMixer.hidden = 4
train.optimizer = @adamw
adamw.learning_rate = 0.01
train.batch_size = 8
train.mesh = @make_mesh
train.steps = 2
train.log_every = 1
"""
MASKED = (
  ENCODER
  + """
from jaxmix.data import StandardLibrary
from jaxmix.data import TextDataset
from jaxmix.models import MaskedLM
from jaxmix.objectives import masked_loss
train.model = @MaskedLM
MaskedLM.encoder = @Encoder
train.objective = @masked_loss
masked_loss.mask_id = 1
train.data = @TextDataset()
TextDataset.source = @StandardLibrary()
TextDataset.tokenizer = @ByteTokenizer()
TextDataset.length = 16
train.evaluation_batches = 1
"""
)
CLASSIFIER = (
  ENCODER
  + """
from jaxmix.data import LabelledDataset
from jaxmix.data import LabelledText
from jaxmix.models import TextClassifier
from jaxmix.objectives import classification_loss
from jaxmix.training.warm_start import from_run
train.model = @TextClassifier
TextClassifier.encoder = @Encoder
train.objective = @classification_loss
train.data = @LabelledDataset()
LabelledDataset.source = @LabelledText()
LabelledText.train = "FOLDER/t.tsv"
LabelledText.validation = "FOLDER/t.tsv"
LabelledText.tokenizer = @ByteTokenizer()
LabelledText.length = 16
LabelledText.text = 0
LabelledText.label = 1
LabelledText.start_id = 1
LabelledText.end_id = 2
train.initial = @from_run
from_run.workdir = "FOLDER/masked"
from_run.parts = {"encoder": "encoder"}
"""
)


def start(folder, name: str, text: str):
  (folder / f"{name}.gin").write_text(text)
  run = load([folder / f"{name}.gin"], [], root=train, supplied=SUPPLIED)
  return run.call(workdir=str(folder / name), config=run.operative_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A masked language model, and a table of texts."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "t.tsv").write_text("".join(f"{'ab' * n}\t{n % 2}\n" for n in range(1, 17)))
  result = start(folder, "masked", MASKED)
  assert np.isfinite(result.validation["loss"])
  return folder


def test_loss_of_masked_tokens_is_not_in_bits_per_byte(folder):
  """It is of some tokens only, told from both sides: perplexity is all that it has."""
  rows = (folder / "masked" / "metrics.jsonl").read_text().splitlines()
  for row in map(json.loads, rows):
    assert "perplexity" in row and "bits_per_byte" not in row
  assert {json.loads(row)["split"] for row in rows} == {"train", "validation"}


def test_begins_with_the_encoder(folder):
  """Without a step of its own the classifier has the run's encoder, and a head of its own; its
  figures are those of two classes."""
  text = CLASSIFIER.replace("FOLDER", str(folder)) + "adamw.learning_rate = 1e-30\n"
  result = start(folder, "classifier", text.replace("adamw.learning_rate = 0.01\n", ""))
  assert {"accuracy", "f1", "matthews"} <= result.validation.keys()
  masked, classifier = (load_run(folder / name).params for name in ("masked", "classifier"))
  jax.tree.map(np.testing.assert_array_equal, classifier["encoder"], masked["encoder"])
  assert np.any(np.asarray(classifier["head"]["linear"]["kernel"]))


def test_a_run_that_goes_on_does_not_ask(folder):
  """The second start has its own checkpoint: it no longer needs the other run."""
  text = CLASSIFIER.replace("FOLDER", str(folder))
  start(folder, "again", text)
  text = text.replace("train.steps = 2", "train.steps = 3").replace("/masked", "/gone")
  assert start(folder, "again", text).step == 3


def test_errors(folder):
  fresh = load_run(folder / "masked").params

  def take(parts, parameters=fresh):
    return from_run(parameters, workdir=folder / "masked", parts=parts)

  with pytest.raises(ValueError, match="the new model has no part 'body' — expected one of enc"):
    take({"body": "encoder"})
  with pytest.raises(ValueError, match="masked has no part 'encoder/head'"):
    take({"encoder": "encoder/head"})
  other = {"encoder": {**fresh["encoder"], "final_norm": {"scale": np.ones(9)}}}
  with pytest.raises(ValueError, match=r"\['scale'\] is \(9,\) here, \(8,\) there"):
    take({"encoder": "encoder"}, other)
  with pytest.raises(FileNotFoundError, match="no run in"):
    from_run(fresh, workdir=folder / "nothing", parts={"encoder": "encoder"})
