"""What the tests of kernels share: the rule that holds them to the matmul forms, and processes that
compile for absent chips."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture(scope="session")
def no_worse(errors, rounding) -> Callable[..., None]:
  """`no_worse(found, by_xla, exact, what)`: of arrays by name, each that is found is as near to the
  exact one as the form that XLA compiles is, within a factor of two and one unit in the last place.

  With segment_ids what stands at padding is left out: it is the op's to clear. With the dtype of
  the operands, the largest error of a float32 result may be one rounding of an operand more: the
  forms round different ones, and their largest errors are not of the same element. Where a comment
  derives them, `units` are more.
  """

  def check(found, by_xla, exact, what, *, segment_ids=None, operands=np.float32, units=1) -> None:
    for name, value in found.items():
      expected, beside, live = np.asarray(exact[name]), by_xla[name], 1
      assert (value.dtype, value.shape) == (beside.dtype, expected.shape), f"{what}, {name}"
      if segment_ids is not None and expected.shape[:2] == segment_ids.shape:
        live = (segment_ids != 0).reshape(*segment_ids.shape, *(1,) * (expected.ndim - 2))
      of_kernel, of_xla = (
        errors(np.asarray(x, np.float64) * live, expected * live) for x in (value, beside)
      )
      unit = rounding(value.dtype, 2 * units)
      rests = {"RMS": unit, "largest": max(unit, rounding(operands, 1))}
      for (kind, rest), kernel, xla in zip(rests.items(), of_kernel, of_xla, strict=False):
        assert kernel <= 2 * xla + rest, (
          f"{what}, {name}: {kind} error {kernel:.1e}, xla {xla:.1e}, worst at {of_kernel[2]}"
        )

  return check


@pytest.fixture(scope="session")
def compile_for_tpus(repository) -> Callable[..., list]:
  """`compile_for_tpus(program, *arguments)`: runs a program in a process of its own, since libtpu
  reads its settings once, before jax is imported; returns what it prints behind "RESULT", as JSON.

  Keywords are more of the process's environment.
  """

  def run(program: str, *arguments: str, **settings: str) -> list:
    if importlib.util.find_spec("libtpu") is None:
      pytest.skip(
        "libtpu is not installed: pip install 'jaxmix[tpu]' to compile for TPUs from here"
      )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "PYTHONPATH": str(repository),
    }
    command = [sys.executable, "-c", program, *arguments]
    options = {"env": environment | settings, "capture_output": True, "text": True}
    process = subprocess.run(command, **options, timeout=600, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(x) for x in re.findall("^RESULT (.*)$", process.stdout, re.MULTILINE)]

  return run
