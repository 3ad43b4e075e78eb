"""What an argument has to be, said to whoever gives another: whole numbers, shares of hosts,
objects of a protocol."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np


def _is_whole(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
  """Raises TypeError where `value` is no whole number, ValueError where it is out of bounds."""
  whole = _is_whole(value)
  if not whole or value < minimum or (maximum is not None and value > maximum):
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    raise (ValueError if whole else TypeError)(
      f"{name}={value!r} — expected a whole number {limits} — set one"
    )


def check_shard(shard: Any, batch_size: Any) -> tuple[int, int]:
  """`shard` as (index, count) of a host, which can take an equal share of every batch."""
  check_integer("batch_size", batch_size, minimum=1)
  pair = isinstance(shard, Sequence) and len(shard) == 2
  if not pair or not all(_is_whole(value) for value in shard) or not 0 <= shard[0] < shard[1]:
    raise ValueError(
      f"shard={shard!r} — expected (index, count) with 0 <= index < count — e.g. "
      "(jax.process_index(), jax.process_count())"
    )
  index, count = shard
  if batch_size % count:
    raise ValueError(
      f"batch_size={batch_size} is no multiple of the {count} hosts — expected equal shares — set "
      f"batch_size={batch_size // count * count or count}"
    )
  return index, count


def check_protocol(name: str, value: Any, protocol: type, *, example: str) -> None:
  """Raises TypeError where `value` lacks a member of the protocol; `example` is a class that has
  them all."""
  if isinstance(value, type):
    raise TypeError(
      f"{name} is the class {value.__name__} — expected an object — write {value.__name__}(...), "
      f"or @{value.__name__}() in a gin file"
    )
  members = [member for member in vars(protocol) if not member.startswith("_")]
  # Looked up without evaluating: the splits of a TFDS source are read from disk.
  if any(inspect.getattr_static(value, member, None) is None for member in members):
    raise TypeError(
      f"{name}={value!r} of type {type(value).__name__} — expected a {protocol.__name__} such as "
      f"{example}(...)"
    )
