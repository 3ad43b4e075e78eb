"""What must hold beyond grammar: nothing undefined, nothing unread, every value of its type."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxmix.configuration.errors import ConfigurationError, nearest
from jaxmix.configuration.signatures import accepts, repaired, signature
from jaxmix.configuration.values import (
  Binding,
  Macro,
  MacroBinding,
  Reference,
  Scope,
  leaves,
  map_leaves,
  written,
)

REQUIRED = Macro("gin.REQUIRED")  # a value that another file or an override must replace


@dataclasses.dataclass(frozen=True)
class Statements:
  """What files and overrides say: all of it, or only what has the last word."""

  root: Callable[..., Any]
  bindings: Sequence[Binding]
  macros: Sequence[MacroBinding]

  def effective(self) -> Statements:
    """The last binding of each parameter and of each macro."""
    bindings = {binding.key: binding for binding in self.bindings}
    macros = {macro.name: macro for macro in self.macros}
    return Statements(self.root, [*bindings.values()], [*macros.values()])

  def applying(self, target: Callable[..., Any], scope: Scope) -> list[Binding]:
    """The bindings of `target` when called inside `scope`, outermost first: later ones win."""
    found = [
      binding
      for binding in self.bindings
      if binding.target is target and binding.scope == scope[: len(binding.scope)]
    ]
    return sorted(found, key=lambda binding: len(binding.scope))

  def reached(self) -> set[tuple[Scope, Callable[..., Any]]]:
    """The functions and classes that the root can come to call, each with its scope."""
    seen: set[tuple[Scope, Callable[..., Any]]] = set()
    pending: list[tuple[Scope, Callable[..., Any]]] = [((), self.root)]
    while pending:
      scope, target = pending.pop()
      if (scope, target) not in seen:
        seen.add((scope, target))
        for binding in self.applying(target, scope):
          for reference in self._references(binding.value):
            pending.append((reference.scope or scope, reference.target))
    return seen

  def read(self) -> list[Binding]:
    """The bindings of what is reached."""
    read = {binding for scope, target in self.reached() for binding in self.applying(target, scope)}
    return [binding for binding in self.bindings if binding in read]

  def _references(self, value: Any) -> Iterator[Reference]:
    """The references in `value`, also through macros, whatever line set them."""
    names: set[str] = set()
    pending = [value]
    while pending:
      for item in leaves(pending.pop()):
        if isinstance(item, Reference):
          yield item
        elif isinstance(item, Macro) and item.name not in names:
          names.add(item.name)
          pending += [macro.value for macro in self.macros if macro.name == item.name]


def expanded(value: Any, macros: Mapping[str, Any]) -> Any:
  """`value` with its macros replaced by what they stand for."""

  def leaf(item: Any) -> Any:
    if isinstance(item, Macro) and item != REQUIRED:
      return expanded(macros[item.name], macros)
    return item

  return map_leaves(leaf, value)


def check(said: Statements, *, supplied: Sequence[str]) -> None:
  """Raises ConfigurationError at the first thing wrong with what the files and overrides say.

  A line that a later one overrides counts as a reader of macros and of bindings: an override can
  replace what uses them, but cannot delete them.
  """
  effective = said.effective()
  macros = {macro.name: macro.value for macro in effective.macros}
  _check_macros(said, macros)
  _check_read(said)
  for binding in said.bindings:
    _check_type(binding, macros)
  for binding in effective.read():
    if REQUIRED in leaves(expanded(binding.value, macros)):
      raise ConfigurationError(
        f"{binding.place}: {binding} must be given a value; "
        f"set it in the run file, or with --gin_param '{binding} = ...'"
      )
  _check_required(effective, supplied)


def _check_macros(said: Statements, macros: Mapping[str, Any]) -> None:
  lines: list[Binding | MacroBinding] = [*said.macros, *said.bindings]
  used = {
    item.name: line for line in lines for item in leaves(line.value) if isinstance(item, Macro)
  }
  for name, line in used.items():
    if name not in macros and name != REQUIRED.name:
      raise ConfigurationError(
        f"{line.place}: %{name} is used, but no file sets {name}"
        + nearest(name, macros, otherwise=f"add a line `{name} = ...`")
      )
  for macro in said.macros:
    _check_circle(macro, macros, (macro.name,))
  for macro in said.macros:
    if macro.name not in used:
      if macro.name in signature(said.root).parameters:
        near = f"; did you mean {said.root.__name__}.{macro.name}?"
      else:
        near = nearest(macro.name, used, otherwise=f"delete the line, or use it as %{macro.name}")
      raise ConfigurationError(f"{macro.place}: sets {macro.name}, which no file reads{near}")


def _check_circle(start: MacroBinding, macros: Mapping[str, Any], path: tuple[str, ...]) -> None:
  for item in leaves(macros.get(path[-1])):
    if isinstance(item, Macro):
      longer = (*path, item.name)
      if item.name in path:
        raise ConfigurationError(
          f"{start.place}: {start.name} has no value: %{' -> %'.join(longer)}; "
          f"give one of them a value"
        )
      _check_circle(start, macros, longer)


def _check_read(said: Statements) -> None:
  reached = said.reached()
  read = set(said.read())
  for binding in said.bindings:
    if binding in read:
      continue
    if any(target is binding.target for _, target in reached):
      scopes = {"/".join(scope) for scope, target in reached if target is binding.target and scope}
      scope = "/".join(binding.scope)
      raise ConfigurationError(
        f"{binding.place}: sets {binding}, "
        f"but nothing refers to {binding.name} in the scope {scope!r}"
        + nearest(scope, scopes, otherwise=f"write @{scope}/{binding.name} where it is to apply")
      )
    raise ConfigurationError(
      f"{binding.place}: sets {binding}, which nothing reads: no reference leads from "
      f"{said.root.__name__} to {binding.name}; "
      f"write @{binding.name} where it is wanted, or delete the line"
    )


def _check_type(binding: Binding, macros: Mapping[str, Any]) -> None:
  parameter = signature(binding.target).parameters.get(binding.parameter)
  if parameter is None:
    return
  value = expanded(binding.value, macros)
  if accepts(parameter.annotation, value):
    return
  through = f" = {_shortened(binding.value)}" if value != binding.value else ""
  repair = repaired(parameter.annotation, value)
  raise ConfigurationError(
    f"{binding.place}: {binding}{through} = {_shortened(value)} ({_kind(value)}), "
    f"expected {parameter.written}"
    + (f"; write {binding} = {_shortened(repair)}" if repair is not None else "")
  )


def _shortened(value: Any) -> str:
  text = written(value, width=sys.maxsize)
  return text if len(text) <= 100 else f"{text[:97]}..."


def _kind(value: Any) -> str:
  if isinstance(value, Reference):
    return "what a call returns" if value.evaluate else "a function or class"
  return type(value).__name__


def _check_required(effective: Statements, supplied: Sequence[str]) -> None:
  """The root has all its arguments, and so has everything that is called without any: `@name()`."""
  for binding in effective.bindings:
    if binding.target is effective.root and binding.parameter in supplied:
      raise ConfigurationError(
        f"{binding.place}: sets {binding}, which is given on the command line; delete the line"
      )
  macros = {macro.name: macro.value for macro in effective.macros}
  _check_called(
    effective, Reference((), effective.root.__name__, True, effective.root), (), supplied
  )
  for scope, target in effective.reached():
    for binding in effective.applying(target, scope):
      for item in leaves(expanded(binding.value, macros)):
        if isinstance(item, Reference) and item.evaluate:
          _check_called(effective, item, item.scope or scope, (), place=f"{binding.place}: ")


def _check_called(
  effective: Statements,
  call: Reference,
  scope: Scope,
  supplied: Iterable[str],
  place: str = "",
) -> None:
  given = {*supplied, *(each.parameter for each in effective.applying(call.target, scope))}
  missing = [name for name in signature(call.target).required if name not in given]
  if missing:
    name = "/".join((*call.scope, call.name))
    raise ConfigurationError(
      f"{place}{name} is called without {', '.join(missing)}; "
      f"add a line `{name}.{missing[0]} = ...`"
    )
