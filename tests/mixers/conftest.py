"""The list of mixers that the laws are held against. A new mixer joins by one entry in `CASES`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix import sharding
from jaxmix.mixers import (
  GLA,
  HGRN2,
  HLA,
  KDA,
  Attention,
  DeltaNet,
  GatedDeltaNet,
  Grassmann,
  Lightning,
  LinearAttention,
  Mamba2,
  MonarchMixer,
  RetNet,
  SimpleGLA,
)
from jaxmix.ops.circular import smooth

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


def recurrent(
  name: str, mixer: type, maps: int, memories: int, *, exceptions=None, **options
) -> Case:
  """A case of a mixer with a matrix state: `maps` counts the weights that a token meets (those of
  convolutions too), `memories` what it reads and writes of the state, in multiply-adds."""
  return Case(
    name,
    functools.partial(mixer, DIM, **options),
    lambda batch, length: batch * length * 2 * (maps + memories),
    exceptions=exceptions or {},
  )


def monarch(
  name: str,
  *,
  order: int = 2,
  residual=False,
  modes: int | None = None,
  exceptions=None,
  **options,
) -> Case:
  """A case of MonarchMixer: a transform of each row and back, and one of each filter."""
  directions = 1 + (options.get("visibility") == "full")

  def flops(batch, length):
    tokens = batch * length * 2 * ((order + 1) * DIM * (DIM + 3) + DIM * DIM)
    groups = (order - 1, 1) if residual else (order - 1,)
    networks = sum(5 * 8 + 8 * 8 + 8 * count * DIM for count in groups)
    if modes is not None:
      networks = 4 * modes * sum(groups) * DIM  # a complex product is four
    basis = 0
    if options.get("basis") == "monarch":  # 1,024 tokens are below 46^2 / 2
      blocks = -(-length // 46)
      basis = 2 * (batch + 1) * sum(groups) * DIM * (46 * blocks**2 + blocks * 46**2)
    size = smooth(2 * length)
    transforms = (2 * batch + directions) * sum(groups) * DIM * round(2.5 * size * math.log2(size))
    return tokens + 2 * directions * length * networks + transforms + basis

  return Case(
    f"monarch_{name}",
    functools.partial(
      MonarchMixer,
      DIM,
      max_length=1024,
      order=order,
      residual=residual,
      modes=modes,
      hidden=8,
      sines=2,
      frequency=1.0,
      **options,
    ),
    flops,
    exceptions=exceptions or {},
  )


def triangle(length: int) -> int:
  return length * (length + 1) // 2


def band(width: int) -> Callable[[int], int]:
  return lambda length: sum(min(position + 1, width) for position in range(length))


_LAWS_OF_STREAMS = ("split", "split_packed", "step", "causality", "streaming")
_WHOLE_ROW = "every token sees the later ones"
_PARALLEL_OR_SATURATED = (
  "tiny inputs leave the bias of the states, parallel vectors; huge ones a gate that turns on "
  "their last digits"
)
_ROUNDING = "a transform rounds all of a row alike; tests/ops/long_convolution_test.py says how far"
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
  recurrent("linear_attention_hedgehog", LinearAttention, 4 * 32 * DIM + 2 * 4 * 8 * 8,
            2 * 4 * 16 * 8, heads=4, feature_map="hedgehog",
            exceptions={"extremes": "a softmax of huge numbers turns on their last digits"}),
  # The output with its gate, where there is one, and the projections; then gates.
  recurrent("retnet", RetNet, (16 + 4 + 8 + 2 * 32) * DIM, (2 + 8) * 2 * 4,
            heads=8, key_heads=2, key_dim=2, value_dim=4),
  recurrent("lightning", Lightning, 5 * DIM * DIM, 2 * 4 * 8 * 8, heads=4,
            exceptions={"plain_transforms": "its decay is not learnt"}),
  recurrent("simple_gla", SimpleGLA, 5 * DIM * DIM + 4 * DIM, 2 * 4 * 8 * 8, heads=4),
  recurrent("mamba2", Mamba2, (3 * 64 + 2 * 16 + 4) * DIM + 4 * (64 + 2 * 16), 2 * 4 * 8 * 16,
            value_dim=16, key_dim=8, groups=2,
            exceptions={"extremes": "its norm squares products of six inputs"}),
  recurrent("gla", GLA, (2 * 16 + 3 * 32 + 16) * DIM + 16 * 16, 2 * 4 * 4 * 8, heads=4),
  recurrent("hgrn2", HGRN2, 4 * DIM * DIM, 2 * 4 * 8 * 8, key_dim=8),
  recurrent("deltanet", DeltaNet, (4 * 32 + 4) * DIM + 4 * 3 * 32, 3 * 4 * 8 * 8, heads=4,
            largest_beta=2.0),
  recurrent("gated_deltanet", GatedDeltaNet, (2 * 16 + 3 * 64 + 2 * 4) * DIM + 4 * (2 * 16 + 64),
            3 * 4 * 8 * 16, heads=2, value_heads=4, key_dim=8),
  recurrent("kda", KDA, (4 * 32 + 4 + 2 * 8) * DIM + 2 * 8 * 32 + 4 * 3 * 32, 3 * 4 * 8 * 8,
            heads=4),
  recurrent("hla_second", HLA, (5 * 32 + 2 * 4) * DIM, 4 * 4 * 8 * 8, heads=4),
  recurrent("hla_asymmetric", HLA, 5 * 32 * DIM, 4 * 4 * 8 * 8, heads=4, order="asymmetric",
            decay="constant"),
  recurrent("hla_third", HLA, 5 * 32 * DIM, 2 * 4 * 8 * (8 + 2 * 9), heads=4, order="third",
            decay="none", normalize=True),
  # Three maps of the blend; of the op, a product and a half a pair of channels.
  recurrent("grassmann", Grassmann, (8 + 28 + 2 * 32) * DIM, 28 * 3 // 2, rank=8, schedule=(3, 5),
            exceptions={"extremes": _PARALLEL_OR_SATURATED}),
  recurrent("grassmann_offsets", Grassmann, (8 + 20 + 3 * 32) * DIM, 20 * 3 // 2, rank=8, heads=2,
            offsets=(1, 2, 5, 17), affine=True, gate="product", norm=True, unpaired="bias",
            output_projection=True, exceptions={"extremes": _PARALLEL_OR_SATURATED}),
  recurrent("grassmann_heads", Grassmann, (8 + 12 + 32) * DIM, 12 * 3 // 2, rank=8, heads=2,
            schedule=((2, 7),), gate="none", output_projection=True,
            exceptions={"extremes": _PARALLEL_OR_SATURATED}),
  recurrent("grassmann_learned", Grassmann, (8 + 28 + 2 * 32) * DIM, 28 * 3 // 2, rank=8,
            offsets=(1, 5), learned_reach=9, window="gauss", norm=True,
            exceptions={"definition": "learnt offsets have one implementation",
                        "extremes": _PARALLEL_OR_SATURATED}),
  monarch("causal", exceptions={"causality": _ROUNDING}),
  monarch("order_3", order=3, residual=True, norm=True, exceptions={"causality": _ROUNDING}),
  monarch("modes", modes=5, exceptions={"causality": _ROUNDING}),
  monarch("basis", basis="monarch", exceptions={"causality": _ROUNDING}),
  monarch("full", visibility="full", residual=True,
          exceptions=dict.fromkeys(_LAWS_OF_STREAMS, _WHOLE_ROW)),
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
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    random = np.random.default_rng(0)

    def fill(path, shape):
      if "log_" in jax.tree_util.keystr(path):  # the logarithm of a rate, or a log-decay
        return random.uniform(-4, -3, shape)
      return (
        random.normal(size=shape) * DIM**-0.5 if len(shape) > 1 else random.uniform(1, 2, shape)
      )

    filled = [fill(path, leaf.shape) for path, leaf in leaves]
    leaves = [leaf for _, leaf in leaves]
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


# A mesh of one device changes nothing, but says that programs are for a CPU: kernels of other
# platforms, which no CPU runs, are then not traced. No mixer has use for another's programs; see
# `programs_of_a_module`.


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def _subject(request):
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield Subject(request.param)
  jax.clear_caches()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def _subject64(request, float64):
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    yield Subject(request.param)
  jax.clear_caches()


@pytest.fixture
def subject(_subject, request) -> Subject:
  """Each mixer in turn, in float32; skipped where the law is declared not to hold."""
  return _obey(_subject, request)


@pytest.fixture
def subject64(_subject64, request) -> Subject:
  """The same with parameters in float64."""
  return _obey(_subject64, request)


class Cut:
  """Eight devices in a mesh of these sizes."""

  def __init__(self, **sizes: int):
    self.mesh = sharding.make_mesh(**sizes)

  def place(self, mixer, arrays):
    """The mixer with its parameters, and arrays [B, T, ...], where the tables put them."""
    graph, state = nnx.split(mixer)

    def put(x, axes):
      return jax.device_put(x, sharding.named_sharding(axes, x.shape, self.mesh))

    state = jax.tree.map(
      lambda parameter: parameter.replace(put(parameter[...], parameter.get_metadata()["axes"])),
      state,
      is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    arrays = jax.tree.map(lambda x: put(x, ("batch", "length", *(None,) * (x.ndim - 2))), arrays)
    return nnx.merge(graph, state), arrays


@pytest.fixture(scope="session")
def devices_cut() -> dict[str, Cut]:
  """The eight virtual devices as meshes, and how a mixer and its inputs are laid on each."""
  return {
    "every_axis": Cut(data=2, tensor=2, sequence=2),
    "length": Cut(data=1, sequence=8),
  }
