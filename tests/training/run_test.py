"""A work directory opens as what was trained in it, at the step that is asked for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmix.configuration import ConfigurationError
from jaxmix.models import Decoder, init_parameters
from jaxmix.sharding import make_mesh
from jaxmix.training.checkpoints import CheckpointMismatch, Checkpoints
from jaxmix.training.run import load_run

CONFIG = """
from jaxmix.data import ByteTokenizer
from jaxmix.data import StandardLibrary
from jaxmix.data import TextDataset
from jaxmix.models import Decoder
from jaxmix.sharding import make_mesh
from jaxmix.training import adamw
from jaxmix.training import train
train.model = @Decoder
Decoder.dim = 8
Decoder.depth = 1
Decoder.pattern = ("linear_attention",)
train.data = @TextDataset()
TextDataset.source = @StandardLibrary()
TextDataset.tokenizer = @ByteTokenizer()
TextDataset.length = 16
train.optimizer = @adamw
adamw.learning_rate = 0.001
train.steps = 30
train.batch_size = 4
train.mesh = @make_mesh
make_mesh.fsdp = 1
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with checkpoints of three steps; the parameters of step n are all n, averaged n + 0.5."""
  folder = tmp_path_factory.mktemp("workdir")
  (folder / "config.gin").write_text(CONFIG)
  shapes = jax.eval_shape(
    lambda key: init_parameters(
      lambda rngs: Decoder(257, 8, 1, pattern=("linear_attention",), rngs=rngs), key
    ),
    jax.random.key(0),
  )
  checkpoints = Checkpoints(folder / "checkpoints")
  for step, loss in ((10, 2.0), (20, 1.0), (30, None)):
    state = {
      name: jax.tree.map(
        lambda x, value=value: jax.device_put(np.full(x.shape, value, x.dtype)), shapes
      )
      for name, value in (("params", step), ("ema", step + 0.5))
    }
    checkpoints.save(step, state, data={}, config=CONFIG, validation_loss=loss)
  checkpoints.close()
  return folder


@pytest.mark.parametrize(("step", "found"), [("latest", 30), ("best", 20), (10, 10)])
def test_a_run_opens_at_the_step_asked_for(workdir, step, found):
  run = load_run(workdir, step=step)
  assert run.step == found
  assert all(np.all(np.asarray(x) == found + 0.5) for x in jax.tree.leaves(run.params))
  assert run.data.length == 16 and run.data.vocab_size == 257
  assert run.configuration.value("batch_size") == 4


def test_parameters_lie_on_the_mesh_of_the_run_or_on_another(workdir):
  run = load_run(workdir)
  assert run.mesh.shape["data"] == jax.device_count()
  over = load_run(workdir, gin_params=["make_mesh.data = 1", "make_mesh.fsdp = -1"])
  assert over.mesh.shape["fsdp"] == jax.device_count()
  one = load_run(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
  for each, devices in ((run, jax.device_count()), (over, jax.device_count()), (one, 1)):
    for x in jax.tree.leaves(each.params):
      assert len(x.sharding.device_set) == devices
  table = over.params["embedding"]["table"]
  assert table.sharding.shard_shape(table.shape) == (257, 8 // jax.device_count())


@pytest.mark.parametrize(
  ("options", "error", "text"),
  [
    ({"step": 11}, FileNotFoundError, r"no checkpoint of step 11 .* it has steps \[10, 20, 30\]"),
    ({"step": "newest"}, ValueError, 'step=\'newest\' is unknown — expected "latest", "best"'),
    (
      {"gin_params": ["Decoder.dim = 16"]},
      CheckpointMismatch,
      r"the model wants float32\[257,16\]",
    ),
    ({"gin_params": ["Decoder.dims = 16"]}, ConfigurationError, "did you mean dim"),
  ],
)
def test_what_the_run_does_not_have_is_said(workdir, options, error, text):
  with pytest.raises(error, match=text):
    load_run(workdir, **options)


def test_a_folder_without_a_run_is_said(workdir, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no run in .*: it has no config.gin — expected"):
    load_run(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"no run in .*: there is no such folder — expected"):
    load_run(tmp_path / "absent")
  (tmp_path / "config.gin").write_text("\n")
  with pytest.raises(ValueError, match=r"config.gin is empty: the run was started by train"):
    load_run(tmp_path)
  (tmp_path / "config.gin").write_text(CONFIG)
  with pytest.raises(FileNotFoundError, match="no checkpoint in"):
    load_run(tmp_path)


def test_best_without_a_validation_is_said(tmp_path):
  (tmp_path / "config.gin").write_text(CONFIG)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(5, {"params": {"x": jax.numpy.zeros(2)}}, data={}, config=CONFIG)
  checkpoints.close()
  with pytest.raises(
    ValueError, match=r'step="best": no checkpoint in .* use step="latest" or .* 5'
  ):
    load_run(tmp_path, step="best")
