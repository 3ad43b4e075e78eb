"""The Monarch mixer against golden vectors of public programs: filters, the mixer with both
visibilities, Hyena operators of two orders, streams."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmix.layers import ImplicitFilter
from jaxmix.layers.implicit_filter import lag_features
from jaxmix.mixers import MonarchMixer
from jaxmix.models import Encoder, MaskedLM

# The programs round the times of lags and the rates of windows to float32, all else is in float64.
TOLERANCE = 2e-7


# A golden masked language model: its modules by ours.
BERT = {
  "embeddings.word_embeddings": ("encoder", "embedding"),
  "embeddings.position_embeddings": ("encoder", "position_embedding"),
  "embeddings.token_type_embeddings": ("encoder", "type_embedding"),
  "embeddings.LayerNorm": ("encoder", "embedding_norm"),
  "head.transform.dense": ("transform",),
  "head.transform.LayerNorm": ("norm",),
}


@pytest.fixture(scope="module", autouse=True)
def _float64(float64):
  """All in float64."""


class Golden:
  """A case of a golden file; its parameters and their gradients by our names."""

  def __init__(self, folder, file: str, case: str):
    data = np.load(folder / "monarch" / f"{file}.npz")
    cut = len(case) + 1
    self._arrays = {key[cut:]: data[key] for key in data.files if key.startswith(f"{case}/")}

  def __getitem__(self, key: str) -> np.ndarray:
    array = self._arrays[key]
    return array if array.dtype.kind in "iu" else array.astype(np.float64)

  def __contains__(self, key: str) -> bool:
    return key in self._arrays

  def names(self, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in self._arrays if key.startswith(prefix)]

  def filter_options(self, prefix: str = "") -> dict:
    """Sizes of the filters, read from their parameters."""
    features = self[f"param/{prefix}pos_emb.z"].shape[2]
    sines = [n for n in self.names(f"param/{prefix}implicit_filter.") if n.endswith("bias")]
    return {
      "max_length": int(self["l_max"]),
      "features": features,
      "hidden": self[f"param/{prefix}implicit_filter.0.weight"].shape[0],
      "sines": len(sines),
      "slope": float(self["w_mod"]) if "w_mod" in self else 1.0,
    }

  def ours(self, prefix: str, module: nnx.Module, order: tuple[int, ...] = (0, 1, 2)) -> dict:
    """The arrays under a prefix, "param/" or "grad/", as a pure dict of the module's parameters;
    `order` gives the place in the program of each of our streams."""
    found = {}
    for name in self.names(prefix):
      if isinstance(module, MonarchMixer):
        found |= _translated(name, self[prefix + name], order)
      elif name != "bias":  # that of the convolution
        found |= _filter(name, self[prefix + name])

    def take(path, leaf):
      return found.pop(tuple(str(key.key) for key in path)).reshape(leaf.shape)

    tree = jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(nnx.state(module)))
    assert not found, found.keys()
    return tree


def _translated(name: str, x: np.ndarray, order) -> dict[tuple, np.ndarray]:
  """{path: array} of what a program calls `name`; its linear weights are (out, in)."""
  first, _, rest = name.partition(".")
  if first in ("filter_fn", "filter_fn2"):
    group = "gated" if first == "filter_fn" else "residual"
    return {(group, *path): y for path, y in _filter(rest, x).items()}
  if first in ("in_linear", "in_proj", "short_filter"):
    streams = x.reshape(len(order), -1, *x.shape[1:])[list(order)]
    module = "convolution" if first == "short_filter" else "into"
    if rest == "bias":
      return {(module, "bias"): streams}
    if module == "convolution":
      return {(module, "weight"): streams}
    return {(module, "kernel"): np.moveaxis(streams, -1, 0)}
  if first == "layernorm":
    return {("norm", "scale" if rest == "weight" else "bias"): x}
  return {("out", "kernel" if rest == "weight" else "bias"): x.T}


def _filter(name: str, x: np.ndarray) -> dict[tuple, np.ndarray]:
  part, *rest = name.split(".")
  if part == "bias":
    return {("skip",): x}
  if part == "pos_emb":
    return {("positions",): x}
  if rest[1] == "freq":
    return {("frequency",): x}
  network = ("networks", "1" if part.endswith("rev") else "0")
  if rest[1] == "bias":
    return {(*network, "biases", str(int(rest[0]) // 2)): x}
  return {(*network, "weights", str(int(rest[0]) // 2)): x.T}


@pytest.mark.parametrize("case", ["posemb0", "posemb1", "posemb2"])
def test_golden_lag_features(case, golden, close):
  data = Golden(golden, "hyena_filter", case)
  features = lag_features(int(data["l_max"]), int(data["emb_dim"]))
  close(features, data["z"], tolerance=1e-5)  # angles of up to 100 in float32
  close(features[:, :1], data["t"], tolerance=1e-6)


@pytest.mark.parametrize("case", ["filter0", "filter1", "filter2", "filter3"])
def test_golden_filters(case, golden, close):
  """Of one direction and of both, of all lags and of some, values and gradients."""
  data = Golden(golden, "hyena_filter", case)
  directions = 2 if "k_rev" in data else 1
  filters = ImplicitFilter(
    {"mlp": data["k"].shape[1]},
    directions=directions,
    rngs=nnx.Rngs(params=0),
    **data.filter_options(),
  )
  graph, _ = nnx.split(filters)
  parameters, gradients = (data.ours(kind, filters) for kind in ("param/", "grad/"))

  def run(parameters):
    return nnx.merge(graph, parameters)(int(data["L"]))

  found, pull = jax.vjp(run, parameters)
  names = ("k", "k_rev")[:directions]
  cotangents = tuple(data[f"d{name}"].T for name in names)
  expected = tuple(data[name].T for name in names)
  close((found, pull(cotangents)[0]), (expected, gradients), tolerance=TOLERANCE)


def run_case(data: Golden, mixer: MonarchMixer, order):
  """y, the gradient of u and those of the parameters, found and stored."""
  graph, _ = nnx.split(mixer)
  parameters, gradients = (data.ours(kind, mixer, order) for kind in ("param/", "grad/"))

  @jax.jit
  def run(u, parameters, dy):
    y, pull = jax.vjp(lambda u, parameters: nnx.merge(graph, parameters)(u)[0], u, parameters)
    return y, *pull(dy)

  return run(data["u"], parameters, data["dy"]), (data["y"], data["du"], gradients)


@pytest.mark.parametrize("case", [
  "causal", "bidirectional", "bidirectional_residual", "bidirectional_residual_norm",
  "causal_residual_short", "bidirectional_residual_short",
])  # fmt: skip
def test_golden_mixer(case, golden, close):
  data = Golden(golden, "m2_seqmixer", case)
  mixer = MonarchMixer(
    data["u"].shape[2],
    visibility="full" if data["bidirectional"] else "causal",
    residual=bool(data["residual"]),
    norm=bool(data["training_additions"]),
    rngs=nnx.Rngs(params=0),
    **data.filter_options("filter_fn."),
  )
  close(*run_case(data, mixer, (0, 1, 2)), tolerance=TOLERANCE)


@pytest.mark.parametrize("case", ["bidirectional_residual_norm", "causal_residual_short"])
def test_golden_mixer_inside(case, golden, close, errors, rounding):
  """The filters of both convolutions, of all lags and of some; and in float32 it is as near to the
  result as the public program is, within a factor of two."""
  data = Golden(golden, "m2_seqmixer", case)
  mixer = MonarchMixer(
    data["u"].shape[2],
    visibility="full" if data["bidirectional"] else "causal",
    residual=True,
    norm=bool(data["training_additions"]),
    rngs=nnx.Rngs(params=0),
    **data.filter_options("filter_fn."),
  )
  nnx.update(mixer, data.ours("param/", mixer))
  length, names = data["u"].shape[1], ("k", "k_rev", "k2", "k2_rev")
  found = (*mixer.gated(length), *mixer.residual(length))
  close(found, tuple(data[name] for name in names if name in data), tolerance=TOLERANCE)
  graph, parameters = nnx.split(mixer)
  u, parameters = jax.tree.map(lambda x: x.astype(jnp.float32), (data["u"], parameters))
  y, _ = nnx.merge(graph, parameters)(u)
  assert y.dtype == jnp.float32
  ours, public = (max(errors(each, data["y"])[:2]) for each in (y, data["y_f32"]))
  assert ours <= 2 * public + rounding(jnp.float32, 2)


@pytest.mark.parametrize(("case", "order"), [("hyena0", (1, 0, 2)), ("hyena1", (2, 1, 0, 3))])
def test_golden_hyena(case, order, golden, close):
  """The Hyena operator, whose gates come in the other order."""
  data = Golden(golden, "hyena_operator", case)
  mixer = MonarchMixer(
    data["u"].shape[2],
    order=int(data["hyena_order"]),
    rngs=nnx.Rngs(params=0),
    **data.filter_options("filter_fn."),
  )
  close(*run_case(data, mixer, order), tolerance=TOLERANCE)


def check_state(data: Golden, state, seen: int, close):
  """Behind a prompt: the last inputs of the short convolution, those of the long one, and what the
  next tokens get from them."""
  gated, last = state["gated_0"], data["state_conv"]
  close(state["convolution"].reshape(last.shape), last, tolerance=TOLERANCE)
  close(gated["memory"][:, :seen], data["state_gated"].swapaxes(1, 2), tolerance=TOLERANCE)
  for name, stored in (("gated_0", "state_pending"), ("residual", "state_pending2")):
    if stored in data:
      block = state[name]["pending"].shape[1]
      pending = data[stored][..., :block].swapaxes(1, 2)
      close(state[name]["pending"], pending, tolerance=TOLERANCE)


@pytest.mark.parametrize("case", ["decode0", "decode1"])
def test_golden_stream(case, golden, close):
  """A prompt, or none, and then token by token."""
  data = Golden(golden, "decode", case)
  mixer = MonarchMixer(
    data["u"].shape[2],
    residual=bool(data["residual"]),
    rngs=nnx.Rngs(params=0),
    **data.filter_options("filter_fn."),
  )
  nnx.update(mixer, data.ours("param/", mixer))
  step = jax.jit(lambda u, state: mixer(u, state=state))
  state, prefill = mixer.init_state(len(data["u"]), dtype=jnp.float64), int(data["prefill"])
  found = []
  for start, end in ((0, prefill), *((t, t + 1) for t in range(prefill, data["u"].shape[1]))):
    y, state = step(data["u"][:, start:end], state)
    found.append(y)
    if end == prefill:
      check_state(data, state, prefill, close)
  close(np.concatenate(found, 1), data["y"], tolerance=TOLERANCE)
  close(np.concatenate(found[1:], 1), data["y_decoded"], tolerance=TOLERANCE)


def _bert(data: Golden, prefix: str, module: MaskedLM) -> dict:
  """The arrays under a prefix by our names, layers stacked."""
  layers: dict[tuple, list] = {}
  found: dict[tuple, np.ndarray] = {}
  for name in data.names(prefix):
    x, (head, _, rest) = data[prefix + name], name.partition(".")
    if head == "layer":
      _, part, inner = rest.split(".", 2)
      if part == "attention":
        paths = {("mixer", *path): y for path, y in _translated(inner, x, (0, 1, 2)).items()}
      elif inner.startswith("layernorm"):
        paths = {("mlp_norm", "scale" if inner.endswith("weight") else "bias"): x}
      else:
        which = ("mlp", "up" if inner.startswith("gated_layers") else "down")
        paths = {(*which, "bias"): x} if x.ndim == 1 else {(*which, "kernel"): x.swapaxes(1, 2)}
      for path, y in paths.items():
        layers.setdefault(("encoder", "layers", "0_monarch", *path), []).append(y)
    elif name == "head.decoder.bias":
      found[("output_bias",)] = x
    else:
      *owner, kind = name.split(".")
      path = BERT[".".join(owner)]
      if path[-1].endswith("embedding"):
        found[(*path, "table")] = x
      elif path == ("transform",):
        found[(*path, "kernel" if kind == "weight" else "bias")] = x.T
      else:
        found[(*path, "scale" if kind == "weight" else "bias")] = x
  found |= {path: np.stack(each) for path, each in layers.items()}

  def take(path, leaf):
    return found.pop(tuple(str(key.key) for key in path)).reshape(leaf.shape)

  tree = jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(nnx.state(module)))
  assert not found, found.keys()
  return tree


@pytest.mark.parametrize("case", ["m2bert0", "m2bert1"])
def test_golden_bert(case, golden, close):
  """Hidden states of the last layer, logits, the loss and its gradients."""
  data = Golden(golden, "m2_model", case)
  dim = data["hidden0"].shape[2]
  mixer = functools.partial(
    MonarchMixer,
    visibility="full",
    residual=True,
    norm=bool(data["training_additions"]),
    **data.filter_options("layer.0.attention.filter_fn."),
  )
  encoder = functools.partial(
    Encoder,
    dim=dim,
    depth=len([key for key in ("hidden1", "hidden2") if key in data]),
    pattern=("monarch",),
    mixers={"monarch": mixer},
    mlp="gated_block_diagonal" if data["glu"] else "block_diagonal",
    mlp_dim=2 * dim,
    placement="mlp_post_norm",
    activation="exact_gelu",
    norm_eps=1e-12,
    learned_positions=int(data["l_max"]),
    token_types=2,
    embedding_norm=True,
  )
  model = MaskedLM(data["logits"].shape[2], encoder=encoder, rngs=nnx.Rngs(params=0))
  graph, _ = nnx.split(model)
  parameters, gradients = (_bert(data, kind, model) for kind in ("param/", "grad/"))
  tokens, labels = data["input_ids"], data["labels"]

  @jax.jit
  def run(parameters):
    def loss(parameters):
      model = nnx.merge(graph, parameters)
      hidden, logits = model.encoder(tokens), model(tokens)
      asked = labels != -100
      log_p = jax.nn.log_softmax(logits.astype(jnp.float64))
      log_p = jnp.take_along_axis(log_p, jnp.where(asked, labels, 0)[..., None], -1)[..., 0]
      return -jnp.sum(jnp.where(asked, log_p, 0)) / asked.sum(), (hidden, logits)

    (loss, out), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
    return loss, out, gradients

  last = data[f"hidden{encoder.keywords['depth']}"]
  expected = (data["loss"], (last, data["logits"]), gradients)
  close(run(parameters), expected, tolerance=20 * TOLERANCE)  # activations are float32


def test_errors():
  with pytest.raises(ValueError, match="visibility='both' is unknown"):
    MonarchMixer(8, visibility="both", rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="order=1"):
    MonarchMixer(8, order=1, rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="modes=4 and visibility='full', but waves decay forward"):
    MonarchMixer(8, visibility="full", modes=4, rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="features=4, expected an odd number"):
    MonarchMixer(8, features=4, rngs=nnx.Rngs(params=0))
  mixer = MonarchMixer(8, max_length=16, rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="17 tokens and filters of max_length=16"):
    mixer(jnp.zeros((1, 17, 8)))
  full = MonarchMixer(8, visibility="full", rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match="cannot stream"):
    full.init_state(1)
  with pytest.raises(ValueError, match="distilled with visibility='full'"):
    full.distilled(4)
