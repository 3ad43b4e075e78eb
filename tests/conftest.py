"""What every test shares: eight virtual devices, a cache of compiled programs, the comparison of
arrays, and the folders of data and golden vectors."""

from __future__ import annotations

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Read by jax when it is imported, here and in the processes that tests start.
# Tests run most programs once, so LLVM's optimisations cost more time than they save: without them
# half of all compilation goes. What XLA itself does to a program stays as it is.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from collections.abc import Callable  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
  """Lets go of the programs that a module compiled: each holds some of the memory maps of which
  Linux gives a process 65,530, and beyond them XLA crashes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
  """The root of the checkout."""
  return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of real data sets and golden vectors that stands beside the checkout."""
  folder = pathlib.Path(os.environ.get("JAXMIX_SHARED", REPOSITORY.parent / "shared"))
  if not folder.is_dir():
    pytest.skip(f"no shared data at {folder}; set JAXMIX_SHARED to the folder that holds it")
  return folder


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
  """The folder of golden vectors, computed by reference programs."""
  folder = pathlib.Path(os.environ.get("JAXMIX_GOLDEN", REPOSITORY.parent / "shared" / "golden"))
  if not folder.is_dir():
    pytest.skip(f"no golden vectors at {folder}; set JAXMIX_GOLDEN to the folder that holds them")
  return folder


def relative_errors(actual, expected) -> tuple[float, float, tuple[int, ...]]:
  """Error of an array against another: RMS over RMS, largest over largest, and where that is.

  Where `expected` is zero throughout, the errors are infinite unless `actual` is too.
  """
  kind = np.complex128 if np.iscomplexobj(expected) else np.float64
  actual, expected = np.asarray(actual, kind), np.asarray(expected, kind)
  if not expected.size:
    return 0.0, 0.0, ()
  difference = np.abs(actual - expected)
  difference = np.where(np.isnan(difference), np.inf, difference)
  worst = np.unravel_index(np.argmax(difference), difference.shape)
  if not difference.any():
    return 0.0, 0.0, tuple(int(index) for index in worst)
  with np.errstate(divide="ignore"):
    rms = np.sqrt(np.mean(difference**2) / np.mean(np.abs(expected) ** 2))
    largest = difference[worst] / np.abs(expected).max()
  return float(rms), float(largest), tuple(int(index) for index in worst)


def assert_close(actual, expected, *, tolerance: float) -> None:
  """Two pytrees of arrays agree: in every leaf both relative errors are at most `tolerance`."""
  actual, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
  assert [path for path, _ in actual] == [path for path, _ in expected]
  for (path, left), (_, right) in zip(actual, expected, strict=True):
    name = jax.tree_util.keystr(path) or "the array"
    assert np.shape(left) == np.shape(right), f"{name}: {np.shape(left)} and {np.shape(right)}"
    rms, largest, worst = relative_errors(left, right)
    assert max(rms, largest) <= tolerance, (
      f"{name}: relative error {rms:.2e} (RMS), {largest:.2e} (largest, at {worst}), "
      f"allowed {tolerance:.2e}"
    )


@pytest.fixture(scope="session")
def errors() -> Callable[..., tuple[float, float, tuple[int, ...]]]:
  """See `relative_errors`."""
  return relative_errors


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
  """See `assert_close`."""
  return assert_close


@pytest.fixture(scope="session")
def rounding() -> Callable[..., float]:
  """`rounding(dtype, operations)`: the relative error that so many roundings leave at worst.

  Each is off by half a unit in the last place at most, and all are upon one another. Errors of a
  random walk stay below by the square root of their number: the room left for cancellation.
  """
  return lambda dtype, operations: operations * float(jnp.finfo(dtype).eps) / 2


@pytest.fixture(scope="module")
def float64():
  """float64 in the whole test module."""
  with jax.enable_x64(True):
    yield
