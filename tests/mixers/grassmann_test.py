"""Grassmann mixing against golden vectors of public programs: the mixer, whole blocks of their four
layouts, and language models; and what only this mixer has."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import Block, DenseMLP, LayerNorm
from jaxmix.mixers import Grassmann
from jaxmix.models import Decoder
from jaxmix.objectives import causal_loss

TOLERANCE = 1e-10  # that of the golden folder for float64

# The names of our modules by those of the programs.
MODULES = {
  "W_red": "reduce",
  "reduce": "reduce",
  "W_plu": "expand",
  "expand": "expand",
  "layer_norm": "norm",
  "ln1": "mixer_norm",
  "attention_norm": "mixer_norm",
  "ln2": "mlp_norm",
  "ffn_norm": "mlp_norm",
  "ln_final": "final_norm",
  "ln_f": "final_norm",
  "tok_embed": "embedding",
  "token_embedding": "embedding",
  "pos_embed": "position_embedding",
  "position_embedding": "position_embedding",
}


@pytest.fixture(scope="module", autouse=True)
def _float64(float64):
  """All in float64."""


class Golden:
  """A golden file, its parameters and their gradients by our names."""

  def __init__(self, folder, name: str):
    data = np.load(folder / "grassmann" / f"{name}.npz")
    self._arrays = {key: data[key] for key in data.files}

  def __getitem__(self, key: str) -> np.ndarray:
    array = self._arrays[key]
    return array if array.dtype.kind in "iu" else array.astype(np.float64)

  def numbers(self, key: str) -> tuple[int, ...]:
    """Such as offsets."""
    return tuple(int(x) for x in self._arrays[key])

  def mixer(self, **options) -> Grassmann:
    """Of the sizes of the file, clamped as all the programs are."""
    return Grassmann(
      self["x"].shape[-1],
      rank=int(self["cfg/r"]),
      offsets=self.numbers("cfg/offsets"),
      scale=1.0,
      normalization="clamp",
      eps=float(self["cfg/eps"]),
      rngs=nnx.Rngs(params=0),
      **options,
    )

  def ours(self, prefix: str, module: nnx.Module) -> dict:
    """The arrays under a prefix, such as "param/", as a pure dict of the module's parameters."""
    found = {}
    for name in self._arrays:
      if name.startswith(prefix):
        for path, value in _translated(name.removeprefix(prefix), self[name]):
          found.setdefault(_path(path, module), []).append(value)

    def take(path, leaf):
      layers = found.pop(tuple(key.key for key in path))
      return np.stack(layers).reshape(leaf.shape)

    tree = jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(nnx.state(module)))
    assert not found
    return tree


def _translated(name: str, value: np.ndarray):
  """(path, array) of what a program calls `name`; its linear weights are (out, in)."""
  *path, kind = name.split(".")
  if path[0] == "blocks":
    yield from (((*path[:2], *rest), x) for rest, x in _translated(name.split(".", 2)[2], value))
  elif path[-1] in ("W_gate", "gate_proj"):
    parts = np.split(value.T, 2) if kind == "weight" else (value,)
    for gate, part in zip(("gate_x", "gate_g"), parts, strict=False):
      yield ("mixer", gate, "kernel" if kind == "weight" else "bias"), part
  elif path[-1].isdigit():
    leaf = ("kernel", value.T) if kind == "weight" else ("bias", value)
    yield ("mlp", "up" if path[-1] == "0" else "down", leaf[0]), leaf[1]
  else:
    module = MODULES[path[-1]]
    if module in ("reduce", "expand"):
      leaf = ("kernel", value.T) if kind == "weight" else ("bias", value)
      yield ("mixer", module, leaf[0]), leaf[1]
    elif "embedding" in module:
      yield (module, "table"), value
    else:
      path = ("mixer", module) if module == "norm" else (module,)
      yield (*path, "scale" if kind == "weight" else "bias"), value


def _path(path: tuple, module: nnx.Module) -> tuple:
  """Where the parameter stands in a mixer, a block or a model."""
  if isinstance(module, Grassmann):
    return path[1:]
  if path[0] != "blocks":
    return path
  index = int(path[1]) % len(module.pattern)
  return ("layers", f"{index}_grassmann", *path[2:])


def run(module: nnx.Module, parameters: dict, function, *arrays):
  """function(module, *arrays) and the gradients of its sum of products with the last array."""
  graph = nnx.graphdef(module)

  def loss(parameters, x, cotangent):
    y = function(nnx.merge(graph, parameters), x)
    return jnp.sum(y * cotangent), y

  *_, (x, cotangent) = (arrays,)
  argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
  gradients, y = jax.jit(jax.grad(loss, argnums=argnums, has_aux=True))(parameters, x, cotangent)
  return y, gradients


@pytest.mark.parametrize(
  "name",
  [
    *(f"mixing_ln_{suffix}" for suffix in ("a", "short", "dup", "single", "len1", "r32")),
    "mixing_core_a",
    "mixing_core_single",
  ],
)
def test_golden_mixers(name, golden, close):
  """The mixer with and without its norm: outputs, gradients of x and of every parameter, and the
  stream, token by token."""
  data = Golden(golden, name)
  mixer = data.mixer(norm="_ln_" in name)
  parameters = data.ours("param/", mixer)
  y, (gradients, dx) = run(mixer, parameters, lambda mixer, x: mixer(x)[0], data["x"], data["cot"])
  close(y, data["out64"], tolerance=TOLERANCE)
  close(dx, data["grad64/x"], tolerance=TOLERANCE)
  close(gradients, data.ours("grad64/param/", mixer), tolerance=TOLERANCE)

  mixer, steps = nnx.merge(nnx.graphdef(mixer), parameters), []
  state = mixer.init_state(len(data["x"]), dtype=jnp.float64)
  step = jax.jit(lambda x, state: mixer(x, state=state))
  for t in range(data["x"].shape[1]):
    y, state = step(data["x"][:, t : t + 1], state)
    steps.append(y)
  close(np.concatenate(steps, 1), data["out64"], tolerance=TOLERANCE)


@pytest.mark.parametrize(
  ("name", "placement", "options"),
  [
    ("block_paper_postnorm", "gated_post_norm", {}),
    ("block_paper_postnorm_eps1e-6", "gated_post_norm", {"unpaired": "bias"}),
    ("block_prenorm_mixln", "pre_norm", {"norm": True}),
    ("block_prenorm_nomixln", "pre_norm", {"unpaired": "bias"}),
    ("block_gate_times_g_postnorm", "post_norm", {"unpaired": "bias", "gate": "product"}),
  ],
)
def test_golden_blocks(name, placement, options, golden, close):
  """The layouts of blocks in which the mixer has been published."""
  data = Golden(golden, name)
  dim = data["x"].shape[-1]
  block = Block(
    data.mixer(**options),
    DenseMLP(dim, int(data["cfg/d_ff"]), activation="exact_gelu", bias=True,
             rngs=nnx.Rngs(params=0)),
    lambda: LayerNorm(dim),
    placement=placement,
    dropout_rate=0.0,
  )  # fmt: skip
  parameters = data.ours("param/", block)
  y, (gradients, dx) = run(block, parameters, lambda block, x: block(x)[0], data["x"], data["cot"])
  close(y, data["out64"], tolerance=TOLERANCE)
  close(dx, data["grad64/x"], tolerance=TOLERANCE)
  close(gradients, data.ours("grad64/param/", block), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", ["lm_prenorm_mixln", "lm_paper_postnorm_schedule"])
def test_golden_language_models(name, golden, close, rounding):
  """All offsets in every layer, and one a layer: logits, the loss of the next token, and gradients
  of both."""
  data = Golden(golden, name)
  tokens = data["tokens"]

  def mixer(dim, *, rngs):
    return Grassmann(
      dim,
      rank=int(data["cfg/r"]),
      scale=1.0,
      normalization="clamp",
      eps=float(data["cfg/eps"]),
      rngs=rngs,
      **({"schedule": data.numbers("cfg/schedule")} if "schedule" in name else
         {"offsets": data.numbers("cfg/offsets"), "norm": True}),
    )  # fmt: skip

  model = Decoder(
    int(data["cfg/vocab"]),
    int(data["cfg/d_model"]),
    int(data["cfg/n_layers"]),
    pattern=("grassmann",),
    mixers={"grassmann": mixer},
    mlp="dense",
    mlp_dim=int(data["cfg/d_ff"]),
    activation="exact_gelu",
    bias=True,
    norm="layer",
    placement="gated_post_norm" if "postnorm" in name else "pre_norm",
    learned_positions=tokens.shape[1],
    rngs=nnx.Rngs(params=0),
  )
  parameters = data.ours("param/", model)
  graph = nnx.graphdef(model)

  def logits_loss(parameters):
    logits = nnx.merge(graph, parameters)(tokens)[0]
    return jnp.sum(logits * data["cot"]), logits

  def token_loss(parameters):
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch["weights"] = np.ones(batch["targets"].shape, np.float32)
    total, weight = causal_loss(nnx.merge(graph, parameters), batch)
    return total / weight

  with_aux = jax.jit(jax.grad(logits_loss, has_aux=True))
  gradients, logits = with_aux(parameters)
  # The model computes in float32: two or three layers of five maps of width 16 to 64, and back.
  tolerance = rounding(jnp.float32, 2 * 3 * 5 * 16)
  close(logits, data["out64"], tolerance=tolerance)
  close(gradients, data.ours("grad64/param/", model), tolerance=tolerance)
  loss, gradients = jax.jit(jax.value_and_grad(token_loss))(parameters)
  close(loss, data["ce64"], tolerance=tolerance)
  close(gradients, data.ours("ce_grad64/param/", model), tolerance=tolerance)


def test_layers_of_a_schedule():
  """One offset a layer: the pattern is repeated until the schedule is whole, or the depth ends."""

  def offsets(depth, pattern, schedule):
    def mixer(dim, *, rngs):
      return Grassmann(dim, rank=4, schedule=schedule, rngs=rngs)

    mixers = {"grassmann": mixer, "other": lambda dim, *, rngs: Grassmann(dim, rank=8, rngs=rngs)}
    model = jax.eval_shape(
      lambda: Decoder(8, 8, depth, pattern=pattern, mixers=mixers, rngs=nnx.Rngs(params=0))
    )
    blocks = [(int(name.split("_")[0]), block) for name, block in model.layers.items()]
    mixers = [block.mixer for _, block in sorted(blocks) if block.mixer.head_rank == 4]
    return model.periods, [mixer.offsets[0] for mixer in mixers]

  assert offsets(6, ("grassmann",), (1, 2, 3)) == (2, [1, 2, 3])
  assert offsets(5, ("grassmann",), (1, 2, 3)) == (1, [1, 2, 3, 1, 2])
  assert offsets(12, ("grassmann", "grassmann", "other"), (1, 2, 3, 4)) == (1, [1, 2, 3, 4] * 2)
  assert offsets(4, ("grassmann",), (7,)) == (4, [7])


def test_causality():
  """What comes later changes nothing, bitwise, in float32."""
  mixer = Grassmann(32, rank=8, offsets=(1, 2, 4), rngs=nnx.Rngs(params=0))
  call = jax.jit(lambda x: mixer(x)[0])
  x = np.random.default_rng(0).normal(size=(2, 40, 32)).astype(np.float32)
  changed = x.copy()
  changed[:, 23:] += 1
  np.testing.assert_array_equal(call(x)[:, :23], call(changed)[:, :23])
  assert (np.asarray(call(x))[:, 23:] != np.asarray(call(changed))[:, 23:]).any(-1).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ["repeated", "scaled", "zero"])
def test_parallel_states(dtype, rows):
  """Repeated tokens, copies of other lengths and zero vectors span no plane: their gradients are
  finite, and at most a thousand times those of others."""
  mixer = Grassmann(32, rank=8, offsets=(1, 2), rngs=nnx.Rngs(params=0))
  random = np.random.default_rng(0)
  generic = random.normal(size=(1, 24, 32))
  x = {
    "repeated": np.broadcast_to(generic[:, :1], generic.shape),
    "scaled": generic[:, :1] * np.arange(1, 25)[:, None],
    "zero": np.zeros_like(generic),
  }[rows]
  weights = random.normal(size=generic.shape)

  @jax.jit
  def gradients(mixer, x):
    return jax.grad(lambda mixer, x: jnp.sum(mixer(x)[0] * weights), argnums=(0, 1))(mixer, x)

  def largest(x):
    tree = gradients(mixer, jnp.asarray(x, dtype))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    return float(jnp.abs(tree[1]).max())

  assert largest(x) <= 1e3 * largest(generic)


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({"rank": 10, "heads": 4}, "Grassmann: rank=10 is not a multiple of heads=4; try heads=2"),
    ({"gate": "sum"},
     "Grassmann: gate='sum' is unknown; expected one of blend, product, none"),
    ({"unpaired": "mean"}, "Grassmann: unpaired='mean' is unknown; expected one of zero, bias"),
    ({"schedule": ()}, "Grassmann: schedule is empty, expected at least one offset, such as (1,)"),
  ],
)  # fmt: skip
def test_refusals(options, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    Grassmann(32, rngs=nnx.Rngs(params=0), **options)


def test_no_stream_with_later_tokens():
  mixer = Grassmann(32, rank=8, offsets=(-1, 1), rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="cannot stream, since tokens see later ones"):
    mixer.init_state(1)
