"""Continuing prompts: one pass over all of them, then one token a step with carried state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmix.inference.sampling import check_options, sample
from jaxmix.models import cast_matrices
from jaxmix.models.capacity import check_positions, check_stream_length

_SHORTEST_PREFILL = 64


def generate(
  graph: nnx.GraphDef,
  params: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  end_id: int | None = None,
) -> Iterator[list[int | None]]:
  """Continues each prompt, and yields the tokens of all of them step by step.

      model = load_run("runs/quickstart")
      for (token,) in generate(model.graph, model.params, [[100, 101]], max_new_tokens=20):
        ...

  The prompts go through the model once, side by side. Every later step takes one token a row and
  the state of the one before, whose memory it reuses; with recurrent mixers its time does not
  depend on how many came before. Nothing is compiled anew for another prompt of about the same
  length (up to the next power of two), for other options but the cheap draw, or for another seed.

  Args:
    graph, params: a decoder's, as in `jaxmix.training.run.Run`. Where the parameters lie on several
      devices, call this and take the tokens under `jax.set_mesh`. The matrices are cast once to the
      dtype in which the model computes, and held beside those given where that is another.
    prompts: token ids of each row, of any lengths. An empty one starts from `end_id`, which stands
      between documents.
    max_new_tokens: steps at most, at least 1.
    temperature, top_k, top_p: see `jaxmix.inference.sample`.
    seed: of the draws; the same call gives the same tokens.
    end_id: the token that ends a row; None means that nothing does.
  Yields:
    One list a step with an entry a row: the row's new token, or None once the row has ended;
    `end_id` itself is not given out. Stops early when all rows have ended.
  Raises:
    ValueError: at the call, before anything runs: no prompt, a token outside the vocabulary, an
      option out of its range, or more tokens than the attention's cache or the learned positions
      have places for.
  """
  check_options(temperature=temperature, top_k=top_k, top_p=top_p)
  model = nnx.merge(graph, params)
  rows = _checked_rows(prompts, end_id, model.vocab_size)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens} — expected at least 1 — set it higher")
  longest = max(map(len, rows))
  length = longest + max_new_tokens - 1  # the last token is given out, not read
  what = f"generate with a prompt of {longest} and max_new_tokens={max_new_tokens}"
  for check in (check_stream_length, check_positions):
    check(model, length, what=what, instead="use a shorter prompt or fewer new tokens")
  draw = functools.partial(
    _draw, jax.random.key(seed), temperature=temperature, top_k=top_k, top_p=top_p
  )
  params = cast_matrices(graph, params, model.dtype)
  return _stream(functools.partial(_advance(graph), params), draw, rows, max_new_tokens, end_id)


def abstract_decoding(
  graph: nnx.GraphDef, params: dict, batch_size: int
) -> tuple[Callable, tuple[dict, jax.ShapeDtypeStruct, None, dict]]:
  """The step of `generate` without any array: to lower, to compile ahead.

  Args:
    graph: a decoder's.   params: its parameters as jax.ShapeDtypeStruct.
    batch_size: rows that are continued side by side.
  Returns:
    The step, which gives its state's memory away, and its arguments: parameters, the last token of
    each row [B], no segment ids, and the state.
  """
  step = _advance(graph)
  prompts = jax.ShapeDtypeStruct((batch_size, _SHORTEST_PREFILL), jnp.int32)
  _, state = jax.eval_shape(step, params, prompts, prompts, None)
  return step, (params, jax.ShapeDtypeStruct((batch_size,), jnp.int32), None, state)


def _stream(
  advance: Callable, draw: Callable, rows: list[list[int]], max_new_tokens: int, end_id: int | None
) -> Iterator[list[int | None]]:
  logits, state = advance(*_left_padded(rows), None)
  tokens = draw(logits, 0)
  ended = np.zeros(len(rows), bool)
  for index in range(1, max_new_tokens + 1):
    now = tokens
    if index < max_new_tokens:
      # The next step is under way before these tokens are waited for, so that the devices never
      # wait for whoever prints them.
      logits, state = advance(now, None, state)
      tokens = draw(logits, index)
    now = np.asarray(now)
    if end_id is not None:
      ended |= now == end_id
      if ended.all():
        return
    yield [None if over else int(token) for over, token in zip(ended, now, strict=True)]


def _left_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and segment ids [B, T] with all rows ending at T, a power of two.

  Padding has segment id 0, which leaves every mixer's state and the positions alone.
  """
  length = max(_SHORTEST_PREFILL, 1 << (max(map(len, rows)) - 1).bit_length())
  tokens = np.zeros((len(rows), length), np.int32)
  segment_ids = np.zeros_like(tokens)
  for index, row in enumerate(rows):
    tokens[index, length - len(row) :] = row
    segment_ids[index, length - len(row) :] = 1
  return tokens, segment_ids


@functools.lru_cache(maxsize=8)
def _advance(graph: nnx.GraphDef) -> Callable:
  """(params, tokens [B, T] or [B], segment_ids, state) -> logits after the last [B, V], state.

  Kept for a graph, since a jitted function remembers what it has compiled.
  """

  def advance(params, tokens, segment_ids, state):
    model = nnx.merge(graph, params)
    tokens = tokens.reshape(tokens.shape[0], -1)
    features, state = model.features(tokens, state=state, segment_ids=segment_ids)
    return model.logits(features[:, -1:])[:, 0], state

  return jax.jit(advance, donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def _draw(key, logits, index, *, temperature, top_k, top_p):
  """The tokens [B] of step `index`; apart from the model, so that options compile only this."""
  return sample(
    logits, jax.random.fold_in(key, index), temperature=temperature, top_k=top_k, top_p=top_p
  )


def _checked_rows(
  prompts: Sequence[Sequence[int]], end_id: int | None, vocab_size: int
) -> list[list[int]]:
  """The prompts as lists; an empty one becomes [end_id]."""
  if len(prompts) == 0:
    raise ValueError("generate: prompts is empty — expected at least one — an empty prompt is []")
  rows = [[int(token) for token in prompt] for prompt in prompts]
  for index, row in enumerate(rows):
    if not row and end_id is None:
      raise ValueError(
        f"generate: prompt {index} is empty, and there is no end_id to start from — expected at "
        "least one token — give a prompt, or the end_id of a tokenizer that has one"
      )
    outside = [token for token in row if not 0 <= token < vocab_size]
    if outside:
      raise ValueError(
        f"generate: prompt {index} has token {outside[0]}, outside the vocabulary of {vocab_size} "
        "— expected ids of the model's tokenizer — encode the prompt with it"
      )
  return [row or [end_id] for row in rows]
