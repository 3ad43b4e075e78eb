"""A checked configuration: calls the root function as the run files say, and writes itself down."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmix.configuration import writing
from jaxmix.configuration.checks import Statements, check, expanded
from jaxmix.configuration.errors import ConfigurationError, nearest
from jaxmix.configuration.reading import Reader, Symbol
from jaxmix.configuration.signatures import accepts, signature
from jaxmix.configuration.values import Binding, Reference, Scope, is_literal, map_leaves


def load(
  gin_files: Sequence[str | Path],
  gin_params: Sequence[str] = (),
  *,
  root: Callable[..., Any],
  supplied: Sequence[str] = (),
) -> Configuration:
  """Reads run files and overrides, and checks all of it before anything is built.

  The files are gin (gin-config 0.5) with dynamic registration: a file imports what it names,
  `from jaxmix.training import train`, and the library has no decorators. Later lines win over
  earlier ones, and overrides over files. `include "models/small.gin"` is looked for in the folder
  of the including file, in the working directory, and in the checkout that holds jaxmix;
  `gin_files` in the latter two. Overrides may use every name that the files import or refer to. A
  reference without a scope inherits the scope it is read in; a macro may hold references; each use
  of `@name()` makes its own object.

  Args:
    gin_files: run files, in order.
    gin_params: overrides in the syntax of the files, such as "train.steps = 100".
    root: the function that everything is set for, such as jaxmix.training.train.
    supplied: parameters of the root that the caller gives in `call`, such as "workdir"; files may
      not set them.
  Returns:
    The configuration. Nothing global changes; any number of them can be used side by side.
  Raises:
    ConfigurationError: a file is missing or malformed; a module, function, class, parameter or
      macro does not exist; a macro or binding is read by nobody; a value is not of the annotated
      type; an argument is missing. One line, with the place, what was expected and how to repair
      it.
  """
  origin = Symbol(root.__module__, (root.__name__,), root)
  reader = Reader(origin)
  for name in gin_files:
    reader.read_file(name)
  for text in gin_params:
    reader.read_override(text)
  said = Statements(root, reader.bindings, reader.macros)
  check(said, supplied=supplied)
  return Configuration(said.effective(), {root: origin} | reader.origins, supplied)


class Configuration:
  """The root function with its arguments, as the run files and overrides set them."""

  def __init__(
    self, statements: Statements, origins: dict[Any, Symbol], supplied: Sequence[str] = ()
  ):
    self._statements = Statements(statements.root, statements.read(), statements.macros)
    self._macros = {macro.name: macro.value for macro in statements.macros}
    self._origins = origins
    self._supplied = supplied

  def call(self, **arguments: Any) -> Any:
    """Calls the root function and returns its result; `arguments` win over what the files say."""
    return self.configured(self._statements.root)(**arguments)

  def value(self, parameter: str, *, of: Callable[..., Any] | None = None) -> Any:
    """The value of one parameter of the root, or of another function or class, as set or by
    default.

    Macros and references are resolved: `@name` gives a callable, `@name()` calls it now.

    Raises:
      ConfigurationError: there is no such parameter, or it has neither a value nor a default.
    """
    target = of or self._statements.root
    bound = self._bound(target, ())
    if parameter in bound:
      return self._resolved(bound[parameter], ())
    parameters = signature(target).parameters
    if parameter not in parameters:
      raise ConfigurationError(
        f"{target.__name__} has no parameter {parameter!r}"
        + nearest(parameter, parameters, otherwise=f"it takes {', '.join(parameters)}")
      )
    if parameters[parameter].default is inspect.Parameter.empty:
      raise ConfigurationError(
        f"{target.__name__}.{parameter} has no value; the caller gives it to call({parameter}=...)"
      )
    return parameters[parameter].default

  def configured(self, target: Callable[..., Any], scope: Scope = ()) -> Callable[..., Any]:
    """`target` with its bindings; `target` itself where it has none."""
    return Configured(self, target, scope) if self._bound(target, scope) else target

  def arguments(
    self, target: Callable[..., Any], scope: Scope, given: Iterable[str]
  ) -> dict[str, Any]:
    """The resolved bindings of `target` in `scope`, but for what is `given` by the caller."""
    bound = self._bound(target, scope)
    return {name: self._resolved(bound[name], scope) for name in bound if name not in given}

  def text(self) -> str:
    """The configuration as one gin text, without includes, that loads again to the same.

    What a later line or an override has replaced is not in it.
    """
    return writing.text(self._statements, self._origins)

  def operative_text(self) -> str:
    """Like `text`, with the defaults of every function and class in use written out.

    Loads to the same run even after a default of the library has changed: this is what belongs
    beside checkpoints.
    """
    root = self._statements.root
    bound = {binding.key for binding in self._statements.bindings}
    defaults = [
      Binding((), parameter.name, target, parameter.name, parameter.default, place="")
      for target in {target for _, target in self._statements.reached()}
      for parameter in signature(target).parameters.values()
      if ((), target, parameter.name) not in bound
      and not (target is root and parameter.name in self._supplied)
      and is_literal(parameter.default)
      and accepts(parameter.annotation, parameter.default)
    ]
    return writing.text(self._statements, self._origins, defaults)

  def _bound(self, target: Callable[..., Any], scope: Scope) -> dict[str, Any]:
    return {each.parameter: each.value for each in self._statements.applying(target, scope)}

  def _resolved(self, value: Any, scope: Scope) -> Any:
    """`value` with macros, references and calls replaced by what they stand for in `scope`."""

    def leaf(item: Any) -> Any:
      if not isinstance(item, Reference):
        return item
      function = self.configured(item.target, item.scope or scope)
      return function() if item.evaluate else function

    return map_leaves(leaf, expanded(value, self._macros))


class Configured:
  """A function or class with its bindings, resolved at each call; the caller's arguments win."""

  def __init__(self, configuration: Configuration, target: Callable[..., Any], scope: Scope):
    self._configuration = configuration
    self._scope = scope
    self.__wrapped__ = target  # where inspect.signature and inspect.unwrap look
    self.__name__ = getattr(target, "__name__", type(target).__name__)
    self.__doc__ = target.__doc__

  def __call__(self, *positional: Any, **named: Any) -> Any:
    given = {*signature(self.__wrapped__).positional[: len(positional)], *named}
    bound = self._configuration.arguments(self.__wrapped__, self._scope, given)
    return self.__wrapped__(*positional, **bound, **named)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Configured) and self._identity == other._identity

  def __hash__(self) -> int:
    return hash(self._identity)

  @property
  def _identity(self) -> tuple[Any, ...]:
    # Two readings of one reference are equal, so that a module which keeps one compiles once.
    return self._configuration, self.__wrapped__, self._scope

  def __repr__(self) -> str:
    return f"@{'/'.join((*self._scope, self.__name__))}"
