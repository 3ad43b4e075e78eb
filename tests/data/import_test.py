"""`import jaxmix.data` costs nothing that is not used, and errors say what to install."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("jax", "grain", "tensorflow_datasets", "tensorflow", "tokenizers", "gin", "orbax")


def loaded(script: str) -> set[str]:
  """The heavy packages that a fresh interpreter holds after `script`."""
  report = f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
  command = [sys.executable, "-c", script + report]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  return set(result.stdout.split())


def test_the_package_and_the_light_names_load_nothing_heavy():
  script = "import jaxmix.data as data; data.ByteTokenizer; data.LocalFiles; data.StandardLibrary"
  assert loaded(script) == set()


def test_tfds_loads_neither_tensorflow_nor_jax():
  assert loaded("from jaxmix.data import TFDS, prepare_tfds") == {"tensorflow_datasets"}


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
  script = "import jaxmix.data\ntry: jaxmix.data.Bytes\nexcept AttributeError as e: print(e)"
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert "has no attribute 'Bytes'" in result.stdout and "ByteTokenizer" in result.stdout


def test_without_tokenizers_the_error_names_the_extra():
  script = (
    "import sys; sys.modules['tokenizers'] = None\n"
    "try: from jaxmix.data import WordPiece\nexcept ImportError as e: print(e)"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert 'pip install "jaxmix[hf]"' in result.stdout
