"""How long a stream a model can carry: a cache of keys has an end, a recurrent state has none."""

from __future__ import annotations

from jaxmix.models.decoder import Decoder


def cache_capacity(model: Decoder) -> int | None:
  """The longest stream, in tokens, that every mixer can remember; None where nothing bounds it.

  A mixer bounds it by an attribute `max_length`, unless its attribute `window` says that it never
  looks back as far.
  """
  return min((mixer.max_length for mixer in _bounded(model)), default=None)


def _bounded(model: Decoder) -> list:
  """Mixers that remember a number of tokens."""
  mixers = [block.mixer for block in model.layers.values()]
  return [
    mixer
    for mixer in mixers
    if getattr(mixer, "max_length", None) is not None and getattr(mixer, "window", None) is None
  ]


def check_stream_length(model: Decoder, length: int, *, what: str, instead: str) -> None:
  """Raises ValueError where a stream of `length` tokens overflows a cache.

  `what` asks for such a stream; `instead` is what its user can do about it.
  """
  capacity = cache_capacity(model)
  if capacity is None or length <= capacity:
    return
  kind = next(type(mixer).__name__ for mixer in _bounded(model) if mixer.max_length == capacity)
  repair = (
    f"set Attention.max_length = {length} (the parameters do not depend on it), or train with "
    "Attention.window or a recurrent mixer, which have no end"
    if kind == "Attention"
    else f"train with {kind}.max_length = {length}, or with a recurrent mixer, which has no end"
  )
  raise ValueError(
    f"{what}: {length} tokens, but the {kind} of this model has a cache for {capacity} — expected "
    f"at most {capacity} — {instead}, or {repair}"
  )


def check_positions(model: Decoder, length: int, *, what: str, instead: str) -> None:
  """Raises ValueError where `length` tokens need more learned positions than the model has.

  `what` and `instead`: see `check_stream_length`.
  """
  table = getattr(model, "position_embedding", None)
  if table is None:
    return
  positions = table.table.shape[0]
  if length > positions:
    raise ValueError(
      f"{what}: {length} tokens, but this model has learned {positions} positions — expected at "
      f"most {positions} — {instead}, or train with rotary positions or a recurrent mixer"
    )
