"""What the house style asks of every file: sizes, names, docstrings."""

from __future__ import annotations

import importlib
import inspect
import subprocess

import pytest
from flax import nnx

PACKAGES = (
  "compile_ahead",
  "configuration",
  "data",
  "evaluation",
  "inference",
  "layers",
  "mixers",
  "models",
  "objectives",
  "ops",
  "sharding",
  "training",
)


def _public(package: str):
  """(name, object) of what a package offers; for a single file, what it defines."""
  module = importlib.import_module(f"jaxmix.{package}")
  names = getattr(module, "__all__", None) or [
    name
    for name, value in vars(module).items()
    if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
  ]
  return [(name, getattr(module, name)) for name in names]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package):
  missing = []
  for name, value in _public(package):
    if not (inspect.isclass(value) or inspect.isfunction(value)):
      continue
    own = value.__doc__ if not inspect.isclass(value) else vars(value).get("__doc__")
    if not own or own.startswith(f"{name}("):  # dataclasses write their signature there
      missing.append(name)
    for method, function in vars(value).items() if inspect.isclass(value) else ():
      if method.startswith("_") and method != "__call__":
        continue
      function = function.fget if isinstance(function, property) else function
      if inspect.isfunction(function) and not function.__doc__ and not _is_protocol(value):
        missing.append(f"{name}.{method}")
  assert not missing


def _is_protocol(value) -> bool:
  return getattr(value, "_is_protocol", False)


OF_NO_SHAPE = (  # or of any
  "basis_flops", "dropout", "explain_implementation", "fourier_factors", "head_channels", "l2_norm",
  "monarch_base", "monarch_to_dense", "transform_flops",
)  # fmt: skip


@pytest.mark.parametrize("package", ["ops", "mixers", "layers"])
def test_docstrings_of_array_functions_give_shapes(package):
  for name, value in _public(package):
    if inspect.isfunction(value) and name not in OF_NO_SHAPE:
      assert any(shape in value.__doc__ for shape in ("[B", "[...", "[D, ", "[M, N]", "batch")), (
        name
      )
    if inspect.isclass(value) and issubclass(value, nnx.Module):
      doc = value.__call__.__doc__
      assert "[" in doc or "x: [B, T, D]" in doc, name


@pytest.mark.parametrize("package", ["mixers", "layers"])
def test_modules_state_their_source(package):
  for name, value in _public(package):
    if inspect.isclass(value) and name not in (
      "GatedOutput",
      "HeadMixer",
      "HeadProjection",
      "Linear",
      "LowRank",
    ):
      text = (value.__doc__ or "") + (inspect.getmodule(value).__doc__ or "")
      assert "arXiv" in text or "et al." in text, name


def test_files_cover_one_idea(repository):
  listed = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
    cwd=repository,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  assert len(listed) > 60
  long, vague = [], []
  for name in listed:
    if not (repository / name).exists():
      continue
    lines = len((repository / name).read_text().splitlines())
    if lines > (600 if name.startswith("pallas_kernels/") else 400):
      long.append(f"{name}: {lines} lines")
    if name.rsplit("/", 1)[-1] in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py"):
      vague.append(name)
  assert not long
  assert not vague


def test_top_level_is_the_given_one(repository):
  listed = subprocess.run(
    ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True
  ).stdout.split()
  top = {name.split("/")[0] for name in listed if not name.startswith(".")}
  given = {"LICENSE", "README.md", "pyproject.toml", "jaxmix", "pallas_kernels"}
  assert top <= given | {"configs", "launch", "tests"}
