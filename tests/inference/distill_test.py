"""A decoder with distilled filters: tokens of its own forward pass, which is near that of the model
that it comes from, in a state whose size does not depend on the length."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.inference import distill_filters, generate
from jaxmix.mixers import LinearAttention, MonarchMixer
from jaxmix.models import Decoder, abstract_parameters, init_parameters, parameter_shardings
from jaxmix.sharding import make_mesh

MIXERS = {
  "monarch": functools.partial(MonarchMixer, max_length=64, residual=True, hidden=8, sines=2),
  "linear_attention": functools.partial(LinearAttention, heads=2),
}
MODES = 12


def build(*pattern: str):
  """A decoder of four layers, its graph and its first parameters."""
  factory = functools.partial(Decoder, 40, 16, 4, pattern=pattern, mixers=MIXERS)
  graph, _, _ = abstract_parameters(factory)
  return graph, jax.jit(lambda: init_parameters(factory, jax.random.key(0)))()


@pytest.fixture(scope="module")
def hybrid():
  return build("monarch", "linear_attention")


@pytest.fixture(scope="module")
def distilled(hybrid):
  return distill_filters(*hybrid, modes=MODES)


TOKENS = np.random.default_rng(1).integers(40, size=(2, 50)).astype(np.int32)


def logits(graph, params):
  return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])(params, TOKENS)


def test_tokens_are_those_of_its_own_forward_pass(distilled):
  graph, params, _ = distilled
  prompt = TOKENS[0, :9].tolist()
  made = [token for (token,) in generate(graph, params, [prompt], max_new_tokens=20, temperature=0)]
  forward = jax.jit(lambda params, x: nnx.merge(graph, params)(x)[0])
  tokens = np.array([prompt + made[:-1]], np.int32)
  assert made == np.argmax(forward(params, tokens)[0, 8:], -1).tolist()


def test_errors_are_those_of_the_filters(hybrid, distilled, close):
  """Layer by layer, measured by what the mixers make of one token among zeros."""
  impulse = np.zeros((1, 64, 16), np.float32)
  impulse[:, 0] = 1
  respond = jax.jit(jax.vmap(lambda filters: filters.convolve(0, impulse)[0][0].T))
  exact, fitted = (nnx.merge(*each[:2]).layers["0_monarch"].mixer for each in (hybrid, distilled))
  errors = distilled[2]
  assert list(errors) == [0, 2]
  for name in ("gated", "residual"):
    k, near = (np.float64(respond(getattr(mixer, name))) for mixer in (exact, fitted))
    difference = near - k
    k[..., 0] -= getattr(exact, name).skip[...][:, 0]
    for period, layer in enumerate(errors):
      found, off = errors[layer][name], difference[period]
      close(found.largest, np.abs(off).max(1), tolerance=1e-3)
      close(found.bound, np.abs(off).sum(1), tolerance=1e-3)
      relative = np.linalg.norm(off, axis=1) / np.linalg.norm(k[period], axis=1)
      close(found.relative, relative, tolerance=1e-3)


def test_more_modes_come_nearer(hybrid, distilled, errors):
  exact = logits(*hybrid)
  few, many = (
    errors(logits(*each[:2]), exact)[0] for each in (distill_filters(*hybrid, modes=3), distilled)
  )
  assert many < few / 3 and many < 0.1


def test_the_state_does_not_grow_with_the_filters(distilled):
  graph, params, _ = distilled
  state = jax.eval_shape(lambda params: nnx.merge(graph, params).init_state(1), params)
  for name in ("gated_0", "residual"):
    assert state["layers"]["0_monarch"][name]["modes"].shape == (2, 1, 16, MODES)


def test_parameters_lie_on_a_mesh_as_others_do(distilled):
  """Each has a name for every axis, layers first."""
  graph, params, _ = distilled
  _, abstract, axes = abstract_parameters(lambda *, rngs: nnx.merge(graph, params))
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  for x, sharding in zip(
    *map(jax.tree.leaves, (abstract, parameter_shardings(abstract, axes, mesh))), strict=True
  ):
    assert len(sharding.spec) == x.ndim
  mixer = parameter_shardings(abstract, axes, mesh)["layers"]["0_monarch"]["mixer"]
  assert mixer["gated"]["angles"].spec[2] == "tensor"


def test_refusals(distilled):
  with pytest.raises(ValueError, match="layers are linear_attention — expected a Monarch mixer"):
    distill_filters(*build("linear_attention"), modes=4)
  with pytest.raises(ValueError, match=f"distilled with .* modes={MODES} — expected"):
    distill_filters(*distilled[:2], modes=4)
