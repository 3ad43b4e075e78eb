"""The list of mixers that the laws are held against. A new mixer joins by one entry in `CASES`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix import sharding
from jaxmix.mixers import Attention, LinearAttention

DIM = 32


@dataclasses.dataclass(frozen=True)
class Case:
  """One mixer under the laws.

  Attributes:
    name: shown in the test's name.
    make: `(*, rngs, implementation=None) -> mixer` of width DIM.
    flops: the forward pass counted by hand, `(batch, length) -> int`.
    computes_in: the widest dtype that it computes in.
    exceptions: law -> why it does not hold for this mixer.
  """

  name: str
  make: Callable[..., nnx.Module]
  flops: Callable[[int, int], int]
  computes_in: str = "float64"
  exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def streams(self) -> bool:
    """Whether it has a state."""
    return "split" not in self.exceptions


def attention(
  name: str, pairs: Callable[[int], int], *, key_dim: int = DIM, exceptions=None, **options
) -> Case:
  """A case of Attention: `pairs(length)` counts the visible pairs, `key_dim` the channels of all
  key heads."""
  return Case(
    f"attention_{name}",
    functools.partial(Attention, DIM, heads=4, max_length=128, **options),
    lambda batch, length: (
      batch * (length * 2 * DIM * (2 * DIM + 2 * key_dim) + 4 * pairs(length) * DIM)
    ),
    computes_in="float32",  # jax.nn.dot_product_attention takes its softmax in float32 always
    exceptions=exceptions or {},
  )


def linear(name: str, *, key_dim: int = 8, value_dim: int = 8, **options) -> Case:
  """A case of LinearAttention: every token is one outer product and one product with the state, in
  each of 4 heads."""
  return Case(
    f"linear_attention_{name}",
    functools.partial(
      LinearAttention, DIM, heads=4, key_dim=key_dim, value_dim=value_dim, **options
    ),
    lambda batch, length: (
      batch * length * 4 * (2 * DIM * (2 * key_dim + 2 * value_dim) + 4 * key_dim * value_dim)
    ),
  )


def triangle(length: int) -> int:
  return length * (length + 1) // 2


def band(width: int) -> Callable[[int], int]:
  return lambda length: sum(min(position + 1, width) for position in range(length))


_LAWS_OF_STREAMS = ("split", "split_packed", "step", "causality", "streaming")
_WHOLE_ROW = "every token sees the later ones"
_COUNTS_PADDING = "without a state, padding inside a document counts towards the window"

CASES = [
  attention("rotary", triangle),
  attention("grouped", triangle, key_heads=2, key_dim=16, position_encoding="none"),
  attention("window", band(9), window=9, exceptions={"padding_inside": _COUNTS_PADDING}),
  attention("full", lambda length: length**2, visibility="full",
            exceptions=dict.fromkeys(_LAWS_OF_STREAMS, _WHOLE_ROW)),
  linear("sum"),
  linear("rms", normalizer="rms", feature_map="relu", key_dim=4, value_dim=12),
  linear("none", normalizer="none", feature_map="identity"),
]  # fmt: skip


class Subject:
  """A case with its mixer and its jitted call, shared by the laws so that each shape compiles
  once."""

  def __init__(self, case: Case):
    self.case = case
    self.mixer = self.make()
    self.call = jax.jit(lambda mixer, x, state, ids: mixer(x, state=state, segment_ids=ids))

  def make(self, implementation: str | None = None) -> nnx.Module:
    """The mixer; the same parameters whatever the implementation.

    numpy fills them: a program that draws them would take longer to compile than the laws take.
    """
    abstract = jax.eval_shape(
      lambda: self.case.make(implementation=implementation, rngs=nnx.Rngs(params=0))
    )
    leaves, tree = jax.tree.flatten(abstract)
    random = np.random.default_rng(0)
    filled = [
      random.normal(size=leaf.shape) * DIM**-0.5
      if leaf.ndim > 1
      else random.uniform(1, 2, leaf.shape)
      for leaf in leaves
    ]
    return jax.tree.unflatten(
      tree, [x.astype(leaf.dtype) for x, leaf in zip(filled, leaves, strict=True)]
    )

  def __call__(self, x, *, state=None, segment_ids=None):
    return self.call(self.mixer, x, state, segment_ids)

  def init_state(self, batch: int, dtype):
    """None where the mixer has no state."""
    return self.mixer.init_state(batch, dtype=dtype) if self.case.streams else None


def _obey(subject: Subject, request) -> Subject:
  law = request.node.originalname.removeprefix("test_")
  if law in subject.case.exceptions:
    pytest.skip(f"not a law of {subject.case.name}: {subject.case.exceptions[law]}")
  return subject


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def _subject(request):
  return Subject(request.param)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def _subject64(request, float64):
  return Subject(request.param)


@pytest.fixture
def subject(_subject, request) -> Subject:
  """Each mixer in turn, in float32; skipped where the law is declared not to hold."""
  return _obey(_subject, request)


@pytest.fixture
def subject64(_subject64, request) -> Subject:
  """The same with parameters in float64."""
  return _obey(_subject64, request)


class Cut:
  """Two ways along the batch and four along the heads."""

  def __init__(self):
    self.mesh = sharding.make_mesh(data=2, tensor=4)

  def place(self, mixer, arrays):
    """The mixer with its parameters, and arrays [B, ...], where the tables put them."""
    graph, state = nnx.split(mixer)

    def put(x, axes):
      return jax.device_put(x, sharding.named_sharding(axes, x.shape, self.mesh))

    state = jax.tree.map(
      lambda parameter: parameter.replace(put(parameter[...], parameter.get_metadata()["axes"])),
      state,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    arrays = jax.tree.map(lambda x: put(x, ("batch", *(None,) * (x.ndim - 1))), arrays)
    return nnx.merge(graph, state), arrays


@pytest.fixture(scope="session")
def devices_cut() -> Cut:
  """The eight virtual devices as a mesh, and how a mixer and its inputs are laid on it."""
  return Cut()
