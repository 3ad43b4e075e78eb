"""How long a stream a model can carry: a cache of keys has an end, a recurrent state has none."""

from __future__ import annotations

from jaxmix.models.decoder import Decoder


def cache_capacity(model: Decoder) -> int | None:
  """The longest stream, in tokens, that every mixer can remember; None where nothing bounds it.

  A mixer bounds it by an attribute `max_length`, unless its attribute `window` says that it never
  looks back as far.
  """
  mixers = [block.mixer for block in model.layers.values()]
  bounds = [
    mixer.max_length
    for mixer in mixers
    if getattr(mixer, "max_length", None) is not None and getattr(mixer, "window", None) is None
  ]
  return min(bounds, default=None)


def check_stream_length(model: Decoder, length: int, *, what: str, instead: str) -> None:
  """Raises ValueError where a stream of `length` tokens overflows a cache.

  `what` asks for such a stream; `instead` is what its user can do about it.
  """
  capacity = cache_capacity(model)
  if capacity is not None and length > capacity:
    raise ValueError(
      f"{what}: {length} tokens, but the attention of this model has a cache for {capacity} — "
      f"expected at most {capacity} — {instead}, or set Attention.max_length = {length} (the "
      "parameters do not depend on it), or train with Attention.window or a recurrent mixer, "
      "which have no end"
    )


def check_positions(model: Decoder, length: int, *, what: str, instead: str) -> None:
  """Raises ValueError where `length` tokens need more learned positions than the model has.

  `what` and `instead`: see `check_stream_length`.
  """
  if model.position_embedding is None:
    return
  positions = model.position_embedding.table.shape[0]
  if length > positions:
    raise ValueError(
      f"{what}: {length} tokens, but this model has learned {positions} positions — expected at "
      f"most {positions} — {instead}, or train with rotary positions or a recurrent mixer"
    )
