"""What linear_attention says of calls that it refuses; the rest is in recurrence_test."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmix import ops


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"state": np.zeros((1, 2, 8, 8)), "normalize": True},
     "linear_attention: state has shape (1, 2, 8, 8), expected (1, 2, 8, 9), that is [B, H, K, "
     "V + 1] with normalize=True, the sum of keys its last column"),
    ({"implementation": "cuda"},
     "linear_attention: implementation='cuda' is unknown; expected None or one of reference, "
     "xla, tpu, gpu"),
  ],
)  # fmt: skip
def test_errors(options, text):
  arrays = (np.zeros((1, 4, 2, 8), np.float32) for _ in range(3))
  with pytest.raises(ValueError) as error:
    ops.linear_attention(*arrays, **options)
  assert str(error.value) == text
