"""The scripts as modules, and one small run that they trained."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
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


RECORDING = """
import json, os, pathlib, sys, uuid
found = {"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
pathlib.Path(os.environ["RECORDS"], uuid.uuid4().hex).write_text(json.dumps(found))
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""

SUPERVISING = """
import subprocess, sys
assert sys.argv[1] == "--"
sys.exit(subprocess.run(sys.argv[2:]).returncode)
"""


class Cluster(NamedTuple):
  """A checkout whose train.py only records how it was called, and programs of a cluster that run
  commands as processes of this machine.

  Attributes:
    checkout: what the launchers take for theirs.
    programs: a folder on PATH.
    records: of the calls of train.py.
  """

  checkout: Path
  programs: Path
  records: Path

  @property
  def gin_file(self) -> str:
    """A run file of the checkout."""
    return str(self.checkout / "configs" / "runs" / "quickstart.gin")

  def program(self, name: str, text: str) -> None:
    """Puts a Python program on PATH."""
    path = self.programs / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)

  def calls(self) -> list[dict]:
    """The calls of train.py: words, environment and folder."""
    return [json.loads(path.read_text()) for path in self.records.iterdir()]


@pytest.fixture
def cluster(repository, script, tmp_path, monkeypatch) -> Cluster:
  """See `Cluster`."""
  found = Cluster(*(tmp_path / name for name in ("checkout", "programs", "records")))
  for folder in (*found, found.checkout / "launch"):
    folder.mkdir()
  for name in ("jaxmix", "pallas_kernels"):
    (found.checkout / name).mkdir()
  for name in ("LICENSE", "README.md", "pyproject.toml"):
    (found.checkout / name).touch()
  shutil.copytree(repository / "configs", found.checkout / "configs")
  run = Path(found.gin_file)  # with rows for the devices of every machine that a test names
  run.write_text(run.read_text().replace("train.batch_size = 8", "train.batch_size = 384"))
  (found.checkout / "launch" / "train.py").write_text(RECORDING)
  (found.checkout / "launch" / "supervise.py").write_text(SUPERVISING)
  monkeypatch.setattr(importlib.import_module("launcher"), "ROOT", found.checkout)
  monkeypatch.setenv("PATH", f"{found.programs}{os.pathsep}{os.environ['PATH']}")
  monkeypatch.setenv("RECORDS", str(found.records))
  return found


@pytest.fixture(scope="session")
def shellcheck() -> Callable[[str], None]:
  """Fails where shellcheck has something to say about a script."""
  folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
  program = shutil.which("shellcheck", path=folders)
  if program is None:
    pytest.skip("there is no shellcheck; pip install 'jaxmix[test]' brings it")

  def check(text: str) -> None:
    # SC2016: a $ in single quotes is there on purpose, for a shell elsewhere.
    command = [program, "--shell", "bash", "--exclude", "SC2016", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

  return check


@pytest.fixture(scope="session")
def train_options(script) -> Callable[[list[str]], dict]:
  """The options of train.py that words of a command line give."""

  def read(words: list[str]) -> dict:
    return vars(script("train").options().parse_args(words))

  return read
