"""A throw-away library, a run file for it, and a way to load texts as run files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest

from jaxmix.configuration import Configuration, load

LIBRARY = '''
from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

if typing.TYPE_CHECKING:
  from nowhere import Absent


Schedule = Literal["cosine", "constant"]


class Source(Protocol):
  def documents(self) -> list[str]: ...


@dataclasses.dataclass(frozen=True)
class Files:
  path: str
  length: int = 128

  def documents(self) -> list[str]:
    return [self.path]


def built_in() -> Files:
  return Files("built in")


class Norm:
  def __init__(self, epsilon: float = 1e-6):
    self.epsilon = epsilon


class Mixer:
  def __init__(
    self, dim: int, *, heads: int = 2, norm: Callable[[], Norm] = Norm, absent: Absent = None
  ):
    self.dim, self.heads, self.norm = dim, heads, norm()


class Rotary(Mixer):
  """Inherits its constructor."""


def scale(x: float, /, *more: float, by: float = 2.0) -> float:
  return by * sum((x, *more))


class Decoder:
  def __init__(
    self,
    depth: int,
    *,
    pattern: tuple[str, ...] = ("a",),
    mixers: Mapping[str, Callable[..., Mixer]] = {},
    rate: float = 0.0,
    activation: Callable[..., Any] | None = None,
    anything=None,
  ):
    self.depth, self.pattern, self.mixers, self.rate = depth, pattern, mixers, rate
    self.activation, self.anything = activation, anything


def train(
  *,
  workdir: str,
  steps: int,
  model: Callable[..., Decoder],
  data: Source | None = None,
  schedule: Schedule = "cosine",
  rate: float = 1e-3,
  window: int | None = None,
  notes: Sequence[str] = (),
  pair: tuple[int, float] = (1, 2.0),
  table: dict[str, list[int]] = {},
  flag: bool = False,
):
  return dict(locals())
'''

_NAMES = ("train", "Decoder", "Mixer", "Norm", "Files", "Rotary", "built_in", "scale")
RUN = (
  "from __gin__ import dynamic_registration\n"
  + "".join(f"from toy_library import {name}\n" for name in _NAMES)
  + """
DIM = 16
train.steps = 10
train.model = @Decoder
Decoder.depth = 2
Decoder.mixers = {"plain": @Mixer, "wide": @wide/Mixer}
Mixer.dim = %DIM
wide/Mixer.heads = 8
"""
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
  """The library as a module; beside it one with a class of the same name, and a broken one."""
  folder = tmp_path_factory.mktemp("library")
  (folder / "toy_library.py").write_text(LIBRARY)
  (folder / "toy_other.py").write_text("class Mixer:\n  def __init__(self, width: int = 1): ...\n")
  (folder / "toy_broken.py").write_text("import a_package_that_is_missing\n")
  sys.path.insert(0, str(folder))
  yield importlib.import_module("toy_library")
  sys.path.remove(str(folder))


@pytest.fixture
def run() -> str:
  """A run file in which everything is right; its last line is line 17."""
  return RUN


@pytest.fixture
def read(library, tmp_path, monkeypatch) -> Callable[..., Configuration]:
  """Loads a text as the file run.gin of an otherwise empty working directory, with overrides."""
  monkeypatch.chdir(tmp_path)

  def read_text(text: str, *gin_params: str) -> Configuration:
    (tmp_path / "run.gin").write_text(text)
    return load(["run.gin"], gin_params, root=library.train, supplied=["workdir"])

  return read_text
