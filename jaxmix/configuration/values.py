"""What stands to the right of "=" in a gin file: literals, references and macros."""

from __future__ import annotations

import dataclasses
import math
import pprint
from collections.abc import Callable, Iterator
from typing import Any

Scope = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%NAME`: the value that some file gives to NAME."""

  name: str

  def __repr__(self) -> str:
    return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/name`, a function or class with its bindings; `@scope/name()`, what it returns."""

  scope: Scope
  name: str
  evaluate: bool
  target: Callable[..., Any] | None = (
    None  # what `name` means; None until the file's imports are looked up
  )

  def __repr__(self) -> str:
    return f"@{'/'.join((*self.scope, self.name))}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
  """One line `scope/name.parameter = value`, with `name` looked up, and where it stands."""

  scope: Scope
  name: str
  target: Callable[..., Any]
  parameter: str
  value: Any
  place: str

  @property
  def key(self) -> tuple[Scope, Callable[..., Any], str]:
    """What the binding sets: later bindings of the same key replace earlier ones."""
    return self.scope, self.target, self.parameter

  def __str__(self) -> str:
    return f"{'/'.join((*self.scope, self.name))}.{self.parameter}"


@dataclasses.dataclass(frozen=True, eq=False)
class MacroBinding:
  """One line `NAME = value`."""

  name: str
  value: Any
  place: str


def leaves(value: Any) -> Iterator[Any]:
  """Yields what is inside nested lists, tuples and dicts (keys and values), or the value itself."""
  if isinstance(value, dict):
    for key, item in value.items():
      yield from leaves(key)
      yield from leaves(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
  """The same nested lists, tuples and dicts with `function` applied to everything inside."""
  if isinstance(value, dict):
    return {map_leaves(function, key): map_leaves(function, item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(map_leaves(function, item) for item in value)
  return function(value)


class _Verbatim:
  """Prints as the given text inside `pprint`."""

  def __init__(self, text: str):
    self.text = text

  def __repr__(self) -> str:
    return self.text


def written(value: Any, *, width: int = 92, name: Callable[[Reference], str] | None = None) -> str:
  """`value` as gin text, over several lines where it is wider than `width`.

  Args:
    value: literals, references, macros, and lists, tuples and dicts of them.
    name: what to call the target of a reference; None keeps the name it was given.
  """

  def leaf(item: Any) -> Any:
    if isinstance(item, Reference) and name is not None:
      return _Verbatim(repr(dataclasses.replace(item, name=name(item))))
    if isinstance(item, float) and math.isinf(item):
      return _Verbatim(
        "1e999" if item > 0 else "-1e999"
      )  # gin, like Python, has no literal for infinity
    return item

  return pprint.pformat(map_leaves(leaf, value), width=width, sort_dicts=False)


def is_literal(value: Any) -> bool:
  """Whether gin text can hold `value`, and gives the same value back."""
  return all(
    item is None or (type(item) in (bool, int, float, str, bytes) and item == item)
    for item in leaves(value)
  )
