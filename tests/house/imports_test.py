"""Imports run one way, heavy libraries have one door each, and `import jaxmix` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Who may import whom: a package imports only packages of a lower tier, or itself.
TIERS = (
  ("pallas_kernels",),
  ("jaxmix.sharding",),
  ("jaxmix.ops",),
  ("jaxmix.layers",),
  ("jaxmix.mixers",),
  ("jaxmix.models",),
  ("jaxmix.objectives", "jaxmix.data", "jaxmix.configuration"),
  ("jaxmix.evaluation", "jaxmix.analysis"),
  ("jaxmix.training", "jaxmix.inference"),
  ("jaxmix.compile_ahead",),
)
TIER = {package: tier for tier, packages in enumerate(TIERS) for package in packages}

# library -> the files or folders that alone may import it
DOORS = {
  "gin": ("jaxmix/configuration/reading.py",),
  "grain": ("jaxmix/data/batches.py", "jaxmix/data/lanes.py"),
  "tensorflow_datasets": ("jaxmix/data/tfds.py",),
  "tokenizers": ("jaxmix/data/subword.py",),
  "orbax": ("jaxmix/training/checkpoints.py",),
  "tensorboardX": ("jaxmix/training/metrics.py",),
  "matplotlib": (
    "jaxmix/training/plots.py",
    "jaxmix/analysis/plots.py",
    "jaxmix/compile_ahead/scaling.py",
  ),
  "optax": ("jaxmix/training/",),
  "cloudpickle": ("jaxmix/compile_ahead/",),
  "flax": (
    "jaxmix/layers/",
    "jaxmix/mixers/",
    "jaxmix/models/",
    "jaxmix/training/",
    "jaxmix/evaluation/",
    "jaxmix/inference/",
    "jaxmix/compile_ahead/run.py",
    "launch/",
  ),
}


@pytest.fixture(scope="module")
def imports(repository) -> dict[Path, list[str]]:
  """File -> dotted names that it imports anywhere, relative to the root of the checkout."""
  found = {}
  for folder in ("jaxmix", "pallas_kernels", "launch"):
    for path in sorted((repository / folder).rglob("*.py")):
      names = []
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
          assert node.level == 0, f"{path}: a relative import; write the whole name"
          names += [f"{node.module}.{alias.name}" for alias in node.names]
      found[path.relative_to(repository)] = names
  assert len(found) > 40, "the walk found too few files to mean anything"
  return found


def _package(name: str) -> str | None:
  """The entry of TIER that a dotted name or a file's module belongs to."""
  owners = [package for package in TIER if name == package or name.startswith(package + ".")]
  return max(owners, key=len, default=None)


def test_imports_run_downward(imports):
  wrong = []
  for path, names in imports.items():
    importer = _package(".".join(path.with_suffix("").parts))
    if importer is None:  # launch scripts and jaxmix/__init__.py stand above all
      continue
    for name in names:
      imported = _package(name)
      if imported not in (None, importer) and TIER[imported] >= TIER[importer]:
        wrong.append(f"{path} imports {name}")
  assert not wrong


def test_mixers_do_not_import_one_another(imports):
  mixers = {
    path: names for path, names in imports.items() if path.parts[:2] == ("jaxmix", "mixers")
  }
  modules = [path.stem for path in mixers if path.stem != "__init__"]
  assert len(modules) >= 2
  for path, names in mixers.items():
    if path.stem != "__init__":
      assert not [name for name in names if name.startswith("jaxmix.mixers")], path


@pytest.mark.parametrize("library", DOORS)
def test_a_library_is_imported_behind_its_door_only(imports, library):
  users = [
    str(path)
    for path, names in imports.items()
    if any(name == library or name.startswith(library + ".") for name in names)
  ]
  assert users, f"nothing imports {library}: it need not be listed here"
  assert [user for user in users if not user.startswith(DOORS[library])] == []


def test_kernels_import_jax_alone(imports):
  allowed = {
    "jax",
    "pallas_kernels",
    "__future__",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "numpy",
  }
  allowed |= {"collections", "re", "typing"}
  for path, names in imports.items():
    if path.parts[0] == "pallas_kernels":
      assert {name.split(".")[0] for name in names} <= allowed, path


def test_nothing_imports_private_jax(imports):
  for path, names in imports.items():
    assert not [name for name in names if name.startswith("jax._src")], path


@pytest.mark.parametrize(
  ("statement", "absent"),
  [
    (
      "import jaxmix",
      ("jax", "flax", "gin", "grain", "orbax", "tensorflow_datasets", "tokenizers"),
    ),
    ("import jaxmix.ops", ("flax", "gin", "grain", "orbax", "tensorflow_datasets", "optax")),
    ("import jaxmix.models", ("gin", "grain", "orbax", "tensorflow_datasets", "tokenizers")),
    ("import jaxmix.training", ("gin", "tensorflow_datasets", "tokenizers", "matplotlib")),
  ],
)
def test_importing_stays_light(statement, absent):
  code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]", f"{statement} also imports {done.stdout}"
