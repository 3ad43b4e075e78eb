"""Where a run goes on: the newest checkpoint that is whole, the same one in every process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmix.training.checkpoints import CheckpointError, Checkpoints

_LOG = logging.getLogger(__name__)


def restore_newest(
  checkpoints: Checkpoints, abstract_state: Mapping[str, Any]
) -> tuple[int, Any, dict[str, Any]] | None:
  """Reads the newest checkpoint that every process can read.

  A damaged one is told of and set aside; the one before it is read instead.

  Args:
    abstract_state: see `Checkpoints.restore`.
  Returns:
    Its step, and the state and the place in the data that it holds; None where there is none.
  Raises:
    CheckpointMismatch: it is of another model.
    CheckpointError: all of them are damaged, or the processes do not see the same ones.
  """
  steps = checkpoints.steps()
  _check_shared(checkpoints, max(steps, default=None))
  for step in reversed(steps):
    read, failure = None, None
    try:
      read = checkpoints.restore(step, abstract_state)
    except CheckpointError as error:
      failure = error
    if not _gathered(failure is not None).any():
      return step, *read
    if failure is None:
      failure = CheckpointError(
        f"checkpoint {checkpoints.directory / str(step)} cannot be read by another process — "
        "expected all to read it — see its error"
      )
    if step == steps[0]:
      raise failure
    _LOG.warning("%s; it is now %s.damaged, and the one before it is read", failure, step)
    checkpoints.set_aside(step)
  return None


def _check_shared(checkpoints: Checkpoints, newest: int | None) -> None:
  found = _gathered(-1 if newest is None else newest).tolist()
  if len({*found}) > 1:
    newest_of = ", ".join(
      f"process {index} {'none' if step < 0 else step}" for index, step in enumerate(found)
    )
    raise CheckpointError(
      f"the processes see different newest checkpoints in {checkpoints.directory}: {newest_of} — "
      "expected a folder that all hosts share — use one on a shared disk or gs://"
    )


def _gathered(value: int) -> np.ndarray:
  """The value of every process, in their order."""
  if jax.process_count() == 1:
    return np.array([value])
  return multihost_utils.process_allgather(np.int32(value)).ravel()
