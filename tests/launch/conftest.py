"""The scripts as modules, and one small run that they trained."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

RUN_FILE = """
from jaxmix.data import ByteTokenizer
from jaxmix.data import LocalFiles
from jaxmix.data import TextDataset
from jaxmix.mixers import Grassmann
from jaxmix.mixers import LinearAttention
from jaxmix.models import Decoder
from jaxmix.training import adamw
from jaxmix.training import train

train.model = @Decoder
Decoder.dim = 16
Decoder.depth = 2
Decoder.pattern = ("linear_attention", "grassmann")
Decoder.mixers = {{"linear_attention": @LinearAttention, "grassmann": @Grassmann}}
LinearAttention.heads = 2
Grassmann.rank = 4
train.data = @TextDataset()
TextDataset.source = @LocalFiles()
TextDataset.tokenizer = @ByteTokenizer()
TextDataset.length = 32
TextDataset.packing = "blocks"
TextDataset.cache_dir = "{folder}/cache"
LocalFiles.train = "{folder}/train.txt"
LocalFiles.validation = "{folder}/validation.txt"
train.optimizer = @adamw
adamw.learning_rate = 0.01
train.steps = 8
train.batch_size = 8
train.log_every = 2
train.evaluate_every = 4
train.checkpoint_every = 4
"""


class Trained(NamedTuple):
  """gin_file: the run file; workdir: where it was trained; output: what the trainer printed."""

  gin_file: Path
  workdir: Path
  output: str


@pytest.fixture(scope="session")
def script(repository) -> Iterator[Callable[[str], ModuleType]]:
  """`script("train")` is launch/train.py as a module."""
  folder = repository / "launch"
  sys.path.insert(0, str(folder))

  def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  yield load
  sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory) -> Trained:
  """A byte model of two layers after eight steps on short sentences."""
  folder = tmp_path_factory.mktemp("trained")
  for split, count in (("train", 60), ("validation", 12)):
    sentences = (f"The {'very ' * (i % 4)}old cat sat on mat {i}.\n" for i in range(count))
    (folder / f"{split}.txt").write_text("".join(sentences))
  gin_file = folder / "run.gin"
  gin_file.write_text(RUN_FILE.format(folder=folder))
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    code = script("train").main(["--gin_file", str(gin_file), "--workdir", str(folder / "run")])
  assert code == 0, output.getvalue()
  return Trained(gin_file, folder / "run", output.getvalue())
