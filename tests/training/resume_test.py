"""Where a run goes on: the newest checkpoint that is whole, and what becomes of a damaged one."""

from __future__ import annotations

import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmix.training.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints
from jaxmix.training.resume import restore_newest


def state(step):
  key = jax.random.fold_in(jax.random.key(0), step)
  return {"params": {"w": jax.random.normal(key, (100, 100))}, "step": jnp.int32(step)}


@pytest.fixture
def checkpoints(tmp_path):
  """Checkpoints of steps 1, 2 and 3."""
  checkpoints = Checkpoints(tmp_path, keep=5)
  for step in (1, 2, 3):
    checkpoints.save(step, state(step), data={"next": step}, config="")
  checkpoints.wait()
  yield checkpoints
  checkpoints.close()


def cut_short(folder):
  largest = max(folder.glob("state/ocdbt.process_0/d/*"), key=os.path.getsize)
  os.truncate(largest, os.path.getsize(largest) // 2)


DAMAGES = {
  "arrays cut short": cut_short,
  "arrays missing": lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
  "no description": lambda folder: (folder / "state" / "_METADATA").unlink(),
  "description empty": lambda folder: (folder / "state" / "_METADATA").write_text(""),
  "no place in the data": lambda folder: shutil.rmtree(folder / "data"),
  "place in the data cut short": lambda folder: (folder / "data" / "metadata").write_text('{"ne'),
  "an empty folder": lambda folder: [shutil.rmtree(path) for path in folder.glob("*/")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_with_a_warning(checkpoints, damage, caplog):
  DAMAGES[damage](checkpoints.directory / "3")
  with caplog.at_level(logging.WARNING, "jaxmix"):
    step, restored, data = restore_newest(checkpoints, jax.eval_shape(lambda: state(0)))
  assert (step, data) == (2, {"next": 2})
  np.testing.assert_array_equal(restored["params"]["w"], state(2)["params"]["w"])
  (warning,) = [each.getMessage() for each in caplog.records if each.name.startswith("jaxmix")]
  assert f"checkpoint {checkpoints.directory}/3 cannot be read: " in warning
  assert "it is now 3.damaged, and the one before it is read" in warning
  # The run comes by that step again.
  assert checkpoints.steps() == [1, 2]
  checkpoints.save(3, state(3), data={"next": 3}, config="")
  assert checkpoints.steps() == [1, 2, 3]
  assert (checkpoints.directory / "3.damaged").is_dir()
  cut_short(checkpoints.directory / "3")
  assert restore_newest(checkpoints, jax.eval_shape(lambda: state(0)))[0] == 2


def test_where_all_are_damaged_nothing_is_begun_anew(checkpoints):
  for step in (1, 2, 3):
    cut_short(checkpoints.directory / str(step))
  with pytest.raises(CheckpointError, match="/1 cannot be read"):
    restore_newest(checkpoints, jax.eval_shape(lambda: state(0)))
  assert checkpoints.steps() == [1]


def test_a_checkpoint_of_another_model_is_not_passed_over(checkpoints):
  with pytest.raises(CheckpointMismatch, match="/3 does not fit the model"):
    restore_newest(checkpoints, {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}})
  assert checkpoints.steps() == [1, 2, 3]


def test_without_a_checkpoint_there_is_nothing_to_read(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  assert restore_newest(checkpoints, jax.eval_shape(lambda: state(0))) is None
  checkpoints.close()
