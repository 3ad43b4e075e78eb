"""What a function or class accepts: names of parameters, and values of their annotations."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from jaxmix.configuration.values import Macro, Reference

_NO_CALLABLES = (bool, int, float, complex, str, bytes, list, tuple, dict, types.NoneType)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter. `annotation` is `Any` where it is for type checkers only; `written`, its text."""

  name: str
  default: Any
  annotation: Any
  written: str


@dataclasses.dataclass(frozen=True)
class Signature:
  """What a function or class can be called with.

  parameters: those that can be given by name.
  positional: the names of those that can be given by position, in order.
  accepts_any: the function has `**kwargs`, or is compiled code that does not tell its parameters.
  returns: the annotation of the result; for a class, the class.
  """

  parameters: dict[str, Parameter]
  positional: tuple[str, ...]
  accepts_any: bool
  returns: Any

  @property
  def required(self) -> list[str]:
    """The names of the parameters that have no default."""
    return [
      name
      for name, parameter in self.parameters.items()
      if parameter.default is inspect.Parameter.empty
    ]


@functools.cache
def signature(target: Callable[..., Any]) -> Signature:
  """The signature of a function, a class (of its constructor) or a callable object."""
  function = _constructor(target) if inspect.isclass(target) else target
  if function is None:
    return Signature({}, (), accepts_any=False, returns=target)
  try:
    found = inspect.signature(function)
  except (ValueError, TypeError):
    return Signature({}, (), accepts_any=True, returns=target if inspect.isclass(target) else Any)
  parameters = list(found.parameters.values())
  if inspect.isclass(target):
    parameters = parameters[1:]  # self, or the class
  namespace = getattr(inspect.unwrap(function), "__globals__", {})
  return Signature(
    {each.name: _parameter(each, namespace) for each in parameters if each.kind in _BY_NAME},
    positional=tuple(each.name for each in parameters if each.kind in _BY_POSITION),
    accepts_any=any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters),
    returns=target if inspect.isclass(target) else _evaluated(found.return_annotation, namespace),
  )


def _constructor(target: type) -> Callable[..., Any] | None:
  """The `__init__` or `__new__` that decides; None where that is `object`'s, which takes nothing.

  `inspect.signature` of the class itself would show the metaclass's `__call__` (nnx has one), which
  takes anything.
  """
  for base in inspect.getmro(target)[:-1]:
    for name in ("__init__", "__new__"):
      if name in vars(base):
        return getattr(base, name)
  return None


def _parameter(parameter: inspect.Parameter, namespace: dict[str, Any]) -> Parameter:
  annotation, written = _evaluated(parameter.annotation, namespace), parameter.annotation
  is_alias = isinstance(written, str) and written.isidentifier() and not inspect.isclass(annotation)
  if is_alias or not isinstance(written, str):
    written = inspect.formatannotation(annotation)  # the name of an alias tells a user nothing
  return Parameter(parameter.name, parameter.default, annotation, written)


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
  """An annotation as an object: modules that postpone annotations leave strings."""
  if annotation is inspect.Parameter.empty:
    return Any
  carrier = types.SimpleNamespace(__annotations__={"it": annotation})
  try:
    return typing.get_type_hints(carrier, globalns=namespace)["it"]
  except (NameError, AttributeError, TypeError, SyntaxError):
    return Any  # it names what is imported only for type checkers


def accepts(annotation: Any, value: Any) -> bool:
  """Whether `value`, literals and references in lists, tuples and dicts, is of the annotated type.

  As type checkers see it: an int is a float, a bool is no int, a str is no sequence of strings.
  Annotations outside of what gin files can express accept everything.
  """
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is Any or isinstance(value, Macro):
    return True
  if isinstance(annotation, typing.NewType):
    return accepts(annotation.__supertype__, value)
  if hasattr(annotation, "__value__"):  # type X = ... (Python 3.12)
    return accepts(annotation.__value__, value)
  if origin in (typing.Union, types.UnionType):
    return any(accepts(choice, value) for choice in arguments)
  if origin is typing.Literal:
    return any(value == choice and type(value) is type(choice) for choice in arguments)
  base = types.NoneType if annotation is None else origin or annotation
  if not isinstance(base, type) or base is object:
    return True
  if isinstance(value, Reference):
    return _accepts_result(base, value) if value.evaluate else _accepts_callable(base, value)
  return _is_instance(value, base) and _accepts_items(arguments, value)


def _is_instance(value: Any, base: type) -> bool:
  if isinstance(value, str | bytes):
    return base is type(value)  # and not the sequence or collection that it also is
  if isinstance(value, bool):
    return base is bool
  if base is float:
    return isinstance(value, int | float)
  try:
    return isinstance(value, base)
  except TypeError:
    return False  # a Protocol without run-time checks: our own interfaces, which no literal has


def _accepts_items(arguments: tuple[Any, ...], value: Any) -> bool:
  if not arguments:
    return True
  if isinstance(value, dict):
    of_key, of_item = arguments[0], arguments[-1] if len(arguments) > 1 else Any
    return all(accepts(of_key, key) and accepts(of_item, item) for key, item in value.items())
  if isinstance(value, tuple) and len(arguments) > 1 and arguments[1] is not Ellipsis:
    return len(value) == len(arguments) and all(map(accepts, arguments, value))
  if isinstance(value, list | tuple):
    return all(accepts(arguments[0], item) for item in value)
  return True


def _accepts_callable(base: type, reference: Reference) -> bool:
  """`@name`, not called: a function, a class, or a callable that has its bindings."""
  if base in (collections.abc.Callable, type):
    return base is not type or inspect.isclass(reference.target)
  if base in _NO_CALLABLES:
    return False
  try:
    return isinstance(reference.target, base) or _has_call(base)
  except TypeError:
    return _has_call(base)  # a Protocol: of functions, or of objects


def _accepts_result(base: type, reference: Reference) -> bool:
  """`@name()`: what it returns, as far as its annotation tells."""
  returns = signature(reference.target).returns
  returns = typing.get_origin(returns) or returns
  if returns is Any or not isinstance(returns, type):
    return True
  if base is collections.abc.Callable:
    return _has_call(returns)
  if base is float and returns is int:
    return True
  try:
    return issubclass(returns, base)
  except TypeError:
    return True  # a Protocol with attributes, or without run-time checks


def _has_call(base: type) -> bool:
  return any("__call__" in vars(each) for each in inspect.getmro(base))


def repaired(annotation: Any, value: Any) -> Any:
  """A value like `value` that `annotation` accepts, such as 4 for "4"; None where there is none."""
  return next((each for each in _rewritings(annotation, value) if accepts(annotation, each)), None)


def _rewritings(annotation: Any, value: Any) -> Iterator[Any]:
  if isinstance(value, Reference):
    yield dataclasses.replace(value, evaluate=not value.evaluate)
  if isinstance(value, str):
    yield from difflib.get_close_matches(value, [*_choices(annotation)], n=1)
    with contextlib.suppress(ValueError, SyntaxError):  # most texts are no literals in quotes
      yield ast.literal_eval(value)
  if isinstance(value, int | float) and not isinstance(value, bool):
    if value in (0, 1):
      yield bool(value)
    if isinstance(value, float) and value.is_integer():
      yield int(value)
    yield str(value)
  if isinstance(value, list | tuple):
    yield from (tuple(value), list(value))
  yield from ((value,), [value])


def _choices(annotation: Any) -> Iterator[str]:
  """The strings that an annotation lists as `Literal`."""
  for argument in typing.get_args(annotation):
    if isinstance(argument, str):
      yield argument
    else:
      yield from _choices(argument)
