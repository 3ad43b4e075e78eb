"""A configuration as gin text: imports, macros, then the bindings, the root's first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmix.configuration.checks import Statements
from jaxmix.configuration.signatures import signature
from jaxmix.configuration.values import Binding, Macro, MacroBinding, Reference, leaves, written

_WIDTH = 100


def text(
  statements: Statements, origins: Mapping[Any, Any], defaults: Sequence[Binding] = ()
) -> str:
  """gin text that loads to `statements`.

  Args:
    statements: the bindings in use, one for each parameter, and all macros; unused macros are left
      out.
    origins: the module and path of every function and class named, as `reading.Symbol`.
    defaults: more bindings to write, in the same form.
  """
  bindings = [*statements.bindings, *defaults]
  macros = _used_macros(bindings, statements.macros)
  targets = [statements.root, *(binding.target for binding in bindings)]
  for line in (*bindings, *macros):
    targets += [item.target for item in leaves(line.value) if isinstance(item, Reference)]
  names, imports = _named(dict.fromkeys(targets), origins)

  def line(left: str, value: Any) -> str:
    right = written(value, width=max(40, _WIDTH - len(left)), name=lambda item: names[item.target])
    return left + right.replace("\n", "\n" + " " * len(left))

  def order(binding: Binding) -> tuple[Any, ...]:
    parameters = [*signature(binding.target).parameters]
    rank = (
      parameters.index(binding.parameter) if binding.parameter in parameters else len(parameters)
    )
    is_root = binding.target is statements.root
    return not is_root, names[binding.target], binding.scope, rank, binding.parameter

  blocks = [["from __gin__ import dynamic_registration", "", *imports]]
  blocks.append([line(f"{macro.name} = ", macro.value) for macro in macros])
  last: tuple[Any, ...] = ()
  for binding in sorted(bindings, key=order):
    if (binding.target, binding.scope) != last:
      last = (binding.target, binding.scope)
      blocks.append([])
    left = "/".join((*binding.scope, names[binding.target]))
    blocks[-1].append(line(f"{left}.{binding.parameter} = ", binding.value))
  return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _used_macros(bindings: Sequence[Binding], macros: Sequence[MacroBinding]) -> list[MacroBinding]:
  """The macros that the bindings name, also through other macros, in the order of setting."""
  by_name = {macro.name: macro for macro in macros}
  used: set[str] = set()
  pending = [binding.value for binding in bindings]
  while pending:
    for item in leaves(pending.pop()):
      if isinstance(item, Macro) and item.name not in used:
        used.add(item.name)
        pending.append(by_name[item.name].value)
  return [macro for macro in macros if macro.name in used]


def _named(
  targets: Mapping[Callable[..., Any], None], origins: Mapping[Any, Any]
) -> tuple[dict[Callable[..., Any], str], list[str]]:
  """A name for every target, and the imports that give them; equal names get a number."""
  names: dict[Callable[..., Any], str] = {}
  imported: dict[tuple[str, str], str] = {}
  for target in targets:
    symbol = origins[target]
    first, *rest = symbol.path
    if (symbol.module, first) not in imported:
      same = sum(name == first for _, name in imported)
      imported[symbol.module, first] = f"{first}_{same + 1}" if same else first
    names[target] = ".".join((imported[symbol.module, first], *rest))
  lines = [
    f"from {module} import {first}" + (f" as {name}" if name != first else "")
    for (module, first), name in imported.items()
  ]
  return names, sorted(lines)
