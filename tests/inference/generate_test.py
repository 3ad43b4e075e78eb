"""Generation is the model's own forward pass, token by token, whatever stands beside a prompt."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmix.inference import generate
from jaxmix.inference.generate import abstract_decoding
from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder, abstract_parameters, cast_matrices, parameter_shardings
from jaxmix.sharding import make_mesh

VOCAB = 62
CAPACITY = 100
POSITIONS = 90
PROMPT = [5, 9, 2, 33, 7]
MIXERS = {
  "linear_attention": functools.partial(LinearAttention, heads=2),
  "attention": functools.partial(Attention, heads=2, max_length=CAPACITY),
  "local": functools.partial(Attention, heads=2, window=6, max_length=2),
}
MODELS = {
  "linear_attention": {"pattern": ("linear_attention",)},
  "attention": {"pattern": ("attention",)},
  "hybrid": {"pattern": ("linear_attention", "local"), "learned_positions": POSITIONS},
}


class Model(NamedTuple):
  graph: nnx.GraphDef
  params: dict
  axes: dict


def build(*, mixers=MIXERS, **options) -> Model:
  """A decoder of two layers with random parameters, too large for rounding to decide an argmax."""
  factory = functools.partial(
    Decoder, VOCAB, 16, 2, mixers=mixers, tied_embeddings=False, **options
  )
  graph, parameters, axes = abstract_parameters(factory)
  random = np.random.default_rng(3)

  def draw(x, axes):  # what keeps the variance through each layer, and tables of unit scale
    scale = 1 if axes.inputs is None else np.prod(x.shape[1 : 1 + axes.inputs]) ** -0.5
    return np.array(
      scale * random.normal(size=x.shape) if axes.is_matrix else np.ones(x.shape), x.dtype
    )

  params = jax.tree.map(draw, parameters, axes)
  return Model(graph, jax.device_put(params, jax.devices()[0]), axes)


@functools.cache
def known(name: str) -> Model:
  """The model of that name in MODELS."""
  return build(**MODELS[name])


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
  """Each kind of model in turn."""
  return known(request.param)


@pytest.fixture(scope="module")
def linear() -> Model:
  return known("linear_attention")


def continued(model: Model, prompts, *, max_new_tokens: int = 24, temperature=0, **options):
  """The new tokens of each row."""
  options = {"max_new_tokens": max_new_tokens, "temperature": temperature, **options}
  steps = list(generate(model.graph, model.params, prompts, **options))
  return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


def likeliest(model: Model, tokens: list[int]) -> list[int]:
  """The most likely next token after each of the tokens, by one pass over all of them."""
  forward = jax.jit(lambda params, x: nnx.merge(model.graph, params)(x)[0])
  return np.argmax(forward(model.params, np.array([tokens], np.int32))[0], axis=-1).tolist()


def test_greedy_tokens_are_the_argmax_of_the_whole_forward_pass(model):
  (made,) = continued(model, [PROMPT])
  assert made == likeliest(model, PROMPT + made[:-1])[len(PROMPT) - 1 :]
  assert len(set(made)) > 3, "a model that repeats itself shows nothing"


def test_a_prompt_gets_beside_others_what_it_gets_alone(model):
  prompts = [PROMPT, list(range(40)), [11]]
  assert continued(model, prompts) == [continued(model, [prompt])[0] for prompt in prompts]


def test_matrices_are_cast_once_and_the_tokens_are_the_same():
  """In bfloat16 the step is handed matrices that it need not cast; the likeliest tokens are those
  of a model that casts float32 ones at every token."""
  model = build(pattern=("linear_attention", "local"), dtype="bfloat16")
  cast = cast_matrices(model.graph, model.params, "bfloat16")
  for x, now, axes in zip(*map(jax.tree.leaves, (model.params, cast, model.axes)), strict=True):
    assert now.dtype == ("bfloat16" if axes.is_matrix else x.dtype)
  step, _ = abstract_decoding(model.graph, model.params, 1)
  tokens, ids = np.array([PROMPT], np.int32), np.ones((1, len(PROMPT)), np.int32)
  found = []
  for params in (model.params, cast):
    _, state = step(params, tokens, ids, None)
    found.append(step(params, tokens[:, 0], None, state)[0])
  np.testing.assert_array_equal(*found)
  assert continued(model, [PROMPT]) == continued(model._replace(params=cast), [PROMPT])


def test_a_mesh_of_devices_gives_the_tokens_of_one():
  model = known("hybrid")
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  shardings = parameter_shardings(model.params, model.axes, mesh)
  spread = model._replace(params=jax.device_put(model.params, shardings))
  prompts = [PROMPT, [11], [40, 41], [9]]
  with jax.set_mesh(mesh):
    made = continued(spread, prompts, max_new_tokens=6)
  assert made == continued(model, prompts, max_new_tokens=6)


def test_a_prompt_may_be_longer_than_the_shortest_prefill(linear):
  long = [7 * index % VOCAB for index in range(65)]
  (made,) = continued(linear, [long[:60]], max_new_tokens=12)
  assert continued(linear, [long[:60] + made[:6]], max_new_tokens=6) == [made[6:]]


def test_a_row_gives_nothing_from_its_end_on_and_the_loop_ends_with_the_last(linear):
  prompts = [PROMPT, [11], [40, 41]]
  free = continued(linear, prompts)
  end_id = free[0][2]
  cut = [row[: row.index(end_id)] if end_id in row else row for row in free]
  assert continued(linear, prompts, end_id=end_id) == cut
  steps = generate(
    linear.graph,
    linear.params,
    [PROMPT, PROMPT],
    max_new_tokens=24,
    temperature=0,
    end_id=end_id,
  )
  assert list(steps) == [[token, token] for token in cut[0]]


def test_an_empty_prompt_starts_from_the_end_of_a_document(linear):
  (after,) = continued(linear, [[8]])
  assert 8 not in after
  assert continued(linear, [[], [8]], end_id=8) == [after, after]


def test_a_seed_decides_the_tokens(linear):
  def drawn(seed):
    options = {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "seed": seed}
    return continued(linear, [PROMPT, PROMPT], max_new_tokens=12, **options)

  first = drawn(1)
  assert drawn(1) == first
  assert drawn(2) != first
  assert first[0] != first[1], "rows are drawn apart"


def test_no_step_no_prompt_and_no_seed_compiles_anew():
  traced = []

  class Counted(LinearAttention):
    def __call__(self, x, **options):
      traced.append(x.shape[1])
      return super().__call__(x, **options)

  counted = build(pattern=("counted",), mixers={"counted": functools.partial(Counted, heads=2)})
  continued(counted, [PROMPT], max_new_tokens=3)
  assert set(traced) == {64, 1}
  traced.clear()
  continued(counted, [list(range(60))], max_new_tokens=40, seed=5, temperature=0.3, top_k=7)
  assert not traced


def test_what_is_on_the_devices_does_not_grow_with_the_position(linear):
  steps = generate(linear.graph, linear.params, [PROMPT], max_new_tokens=60)
  sizes = [sum(x.nbytes for x in jax.live_arrays()) for _ in steps]
  assert sizes[50] <= sizes[5]


@pytest.mark.parametrize(
  "name, limit, text",
  [
    (
      "attention",
      CAPACITY,
      "prompt of 5 and max_new_tokens=97: 101 tokens, but the Attention of this model has a cache "
      f"for {CAPACITY} — expected at most {CAPACITY} — use a shorter prompt or fewer new tokens, "
      r"or set Attention.max_length = 101 .*, or train with Attention.window or a recurrent mixer",
    ),
    (
      "hybrid",
      POSITIONS,
      f"prompt of 5 and max_new_tokens=87: 91 tokens, but this model has learned {POSITIONS} "
      f"positions — expected at most {POSITIONS} — use a shorter prompt or fewer new tokens, or "
      "train with rotary positions or a recurrent mixer",
    ),
  ],
)
def test_the_last_token_that_fits_is_right_and_one_more_is_refused(name, limit, text):
  model = known(name)
  fits = limit - len(PROMPT) + 1  # the last token is not read
  (made,) = continued(model, [PROMPT], max_new_tokens=fits)
  assert made[-1] == likeliest(model, PROMPT + made[:-1])[-1]
  with pytest.raises(ValueError, match=text):
    generate(model.graph, model.params, [[1], PROMPT], max_new_tokens=fits + 1)


@pytest.mark.parametrize(
  "prompts, options, text",
  [
    ([], {}, "prompts is empty — expected at least one"),
    ([[1], []], {}, "prompt 1 is empty, and there is no end_id to start from"),
    ([[1, VOCAB]], {}, f"prompt 0 has token {VOCAB}, outside the vocabulary of {VOCAB}"),
    ([[-1]], {}, f"prompt 0 has token -1, outside the vocabulary of {VOCAB}"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 — expected at least 1"),
    ([[1]], {"top_p": 2.0}, "top_p=2.0 — expected a probability"),
  ],
)
def test_what_cannot_be_generated_is_refused_at_the_call(linear, prompts, options, text):
  with pytest.raises(ValueError, match=text):
    generate(linear.graph, linear.params, prompts, **{"max_new_tokens": 4, **options})
