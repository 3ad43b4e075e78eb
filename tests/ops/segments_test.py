"""Which document a token belongs to and where in it it stands, against a plain loop over the
tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmix import ops


def counted(row, first: int):
  """(document, position) of each token of a row, one after the other."""
  document, position, current = 0, first, 0
  for token in row:
    if token and current and token != current:
      document, position = document + 1, 0
    current = token or current
    yield document, position
    position += bool(token)


@pytest.mark.parametrize("ids", [3, 60], ids=["few_ids", "many_ids"])
def test_documents_and_positions(ids):
  """Random rows, dense and full of padding, with documents that go on from an earlier call."""
  random = np.random.default_rng(0)
  segment_ids = np.repeat(random.integers(0, ids, size=(200, 12)), 3, axis=1).astype(np.int32)
  segment_ids[random.random(segment_ids.shape) < 0.1] = 0
  segment_ids[0] = 0  # nothing but padding
  segment_ids[1] = 7  # nothing but one document
  first = random.integers(0, 100, size=200).astype(np.int32)
  expected = np.array([list(counted(*row)) for row in zip(segment_ids, first, strict=True)])
  documents = jax.jit(ops.document_indices)(segment_ids)
  positions = jax.jit(ops.document_positions)(segment_ids, first)
  np.testing.assert_array_equal(documents, expected[..., 0])
  np.testing.assert_array_equal(positions, expected[..., 1])
  assert documents.dtype == positions.dtype == np.int32


def test_no_tokens():
  empty = np.zeros((2, 0), np.int32)
  assert ops.document_indices(empty).shape == (2, 0)
  assert ops.document_positions(empty, np.zeros(2, np.int32)).shape == (2, 0)
