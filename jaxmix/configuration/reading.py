"""Reading gin files: text to bindings, with every name looked up and the place of every line kept.

The only file that imports gin, and what it takes from gin is the grammar. gin's own registry is
global, applies bindings through decorators and remembers no places; here a file means what its
imports say, as in Python.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import tokenize
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

from jaxmix.configuration.errors import ConfigurationError, nearest
from jaxmix.configuration.signatures import signature
from jaxmix.configuration.values import Binding, Macro, MacroBinding, Reference, map_leaves

_CHECKOUT = Path(__file__).resolve().parents[2]
_GRAMMAR = (
  "expected one `name.parameter = value` a line, with strings in quotes, numbers, True, False, "
  "None, @references, %MACROS, and lists, tuples and dicts of these"
)
_IMPORT_GRAMMAR = "expected `import module` or `from module import name`, one name a line"


class _Delegate(config_parser.ParserDelegate):
  """Makes our references and macros for gin's parser."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
    *scope, name = scoped_configurable_name.split("/")
    return Reference(tuple(scope), name, evaluate)

  def macro(self, macro_name: str) -> Macro:
    return Macro(macro_name)


@dataclasses.dataclass(frozen=True)
class Symbol:
  """What a name in a file means: the attributes `path` below the module, and the value there."""

  module: str
  path: tuple[str, ...]
  value: Any

  def attribute(self, name: str) -> Symbol:
    """What `.name` means; raises AttributeError."""
    value = getattr(self.value, name)
    if isinstance(value, types.ModuleType):
      return Symbol(value.__name__, (), value)
    return Symbol(self.module, (*self.path, name), value)


@dataclasses.dataclass(frozen=True)
class _Source:
  """One text being read: a file with its folder, or one override without.

  symbols: what its imports give; places: where it has set which parameter or macro so far.
  """

  name: str
  folder: Path | None
  symbols: dict[str, Symbol]
  places: dict[Any, str] = dataclasses.field(default_factory=dict)

  def place(self, line: int) -> str:
    return f"{self.name}:{line}" if self.folder else self.name

  def sets(self, key: Any, what: object, place: str) -> None:
    """Notes that this text sets `key`; twice is a mistake, for the first line would do nothing."""
    if key in self.places:
      raise ConfigurationError(
        f"{place}: {what} is set a second time, after {self.places[key]}; delete one of the two"
      )
    self.places[key] = place


class Reader:
  """Collects what run files and overrides say, in the order in which they say it.

  bindings, macros: every line read so far; later lines win.
  origins: where each function or class can be imported from.
  """

  def __init__(self, root: Symbol):
    self.bindings: list[Binding] = []
    self.macros: list[MacroBinding] = []
    self.origins: dict[Any, Symbol] = {}
    self._meanings: dict[str, list[Symbol]] = {}  # of every name in any file, for the overrides
    self._note_meaning(root.path[-1], root)
    self._open: list[Path] = []

  def read_file(self, name: str | Path) -> None:
    """Reads a run file, from the working directory or the checkout that holds jaxmix."""
    self._read_file(_find(Path(name), (Path.cwd(), _CHECKOUT), "gin_file"))

  def read_override(self, text: str) -> None:
    """Reads one override, a line as in a file, with the names of all files."""
    symbols = {name: means[0] for name, means in self._meanings.items() if len(means) == 1}
    self._read(text, _Source(f"--gin_param {text!r}", None, symbols))

  def _read_file(self, path: Path) -> None:
    if path in self._open:
      circle = " -> ".join(map(_shown, [*self._open[self._open.index(path) :], path]))
      raise ConfigurationError(
        f"{_shown(path)} includes itself: {circle}; delete one of the includes"
      )
    try:
      text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigurationError(
        f"cannot read {_shown(path)}: {error}; expected a readable gin file in UTF-8"
      ) from error
    self._open.append(path)
    self._read(text, _Source(_shown(path), path.parent, {}))
    self._open.pop()

  def _read(self, text: str, source: _Source) -> None:
    for statement in _statements(text, source):
      place = source.place(statement.location.line_num)
      match statement:
        case config_parser.ImportStatement():
          self._import(statement, source, place)
        case config_parser.IncludeStatement():
          folders = [Path.cwd(), _CHECKOUT]
          if source.folder:
            folders.insert(0, source.folder)
          self._read_file(_find(Path(statement.filename), folders, f"{place}: include"))
        case config_parser.BlockDeclaration():
          self._target(statement.selector, source, place)
        case config_parser.BindingStatement(arg_name=""):
          self._set_macro(statement, source, place)
        case config_parser.BindingStatement():
          self._bind(statement, source, place)

  def _import(self, statement: Any, source: _Source, place: str) -> None:
    if statement.module.startswith("__gin__."):
      if statement.module != "__gin__.dynamic_registration":
        feature = statement.module.removeprefix("__gin__.")
        raise ConfigurationError(
          f"{place}: unknown gin feature {feature!r}; expected dynamic_registration"
        )
      return  # the way we read every file
    symbol = _imported(statement.module, statement.is_from, place)
    if not statement.is_from and not statement.alias:
      package = statement.module.partition(".")[0]  # as in Python, `import a.b` gives the name a
      symbol = Symbol(package, (), importlib.import_module(package))
    source.symbols[statement.bound_name()] = symbol
    self._note_meaning(statement.bound_name(), symbol)

  def _set_macro(self, statement: Any, source: _Source, place: str) -> None:
    name = "/".join(filter(None, (statement.scope, statement.selector)))
    source.sets(name, name, place)
    self.macros.append(MacroBinding(name, self._looked_up(statement.value, source, place), place))

  def _bind(self, statement: Any, source: _Source, place: str) -> None:
    binding = Binding(
      scope=tuple(filter(None, statement.scope.split("/"))),
      name=statement.selector,
      target=self._target(statement.selector, source, place),
      parameter=statement.arg_name,
      value=self._looked_up(statement.value, source, place),
      place=place,
    )
    source.sets(binding.key, binding, place)
    accepted = signature(binding.target)
    if binding.parameter not in accepted.parameters and not accepted.accepts_any:
      known = list(accepted.parameters)
      raise ConfigurationError(
        f"{place}: {binding.name} has no parameter {binding.parameter!r}"
        + nearest(binding.parameter, known, otherwise=f"it takes {', '.join(known) or 'none'}")
      )
    self.bindings.append(binding)

  def _looked_up(self, value: Any, source: _Source, place: str) -> Any:
    """`value` with the targets of its references filled in."""

    def leaf(item: Any) -> Any:
      if isinstance(item, Reference):
        return dataclasses.replace(item, target=self._target(item.name, source, place))
      return item

    return map_leaves(leaf, value)

  def _target(self, selector: str, source: _Source, place: str) -> Any:
    """The function or class that a dotted name means in this text."""
    first, *attributes = selector.split(".")
    if first not in source.symbols:
      meanings = [".".join((each.module, *each.path)) for each in self._meanings.get(first, ())]
      if source.folder is None and meanings:
        raise ConfigurationError(
          f"{place}: {first!r} means {' and '.join(meanings)} in the files; "
          "import one of them under another name there: `from ... import ... as ...`"
        )
      raise ConfigurationError(
        f"{place}: {first!r} is not imported"
        + nearest(first, source.symbols, otherwise=f"import it first: from ... import {first}")
      )
    symbol = source.symbols[first]
    for index, name in enumerate(attributes):
      try:
        symbol = symbol.attribute(name)
      except AttributeError as error:
        owner = ".".join([first, *attributes[:index]])
        raise ConfigurationError(
          f"{place}: {owner} has no {name!r}" + nearest(name, _public(symbol.value))
        ) from error
    if not callable(symbol.value):
      raise ConfigurationError(
        f"{place}: {selector} is a {type(symbol.value).__name__}; expected a function or a class"
      )
    self.origins.setdefault(symbol.value, symbol)
    self._note_meaning(symbol.path[-1], symbol)
    return symbol.value

  def _note_meaning(self, name: str, symbol: Symbol) -> None:
    meanings = self._meanings.setdefault(name, [])
    if all(symbol.value is not each.value for each in meanings):
      meanings.append(symbol)


def _statements(text: str, source: _Source) -> Iterator[Any]:
  """gin's statements of `text`; an error is one line with the place and what stands there."""
  try:
    yield from config_parser.ConfigParser(text, _Delegate())
  except SyntaxError as error:
    lines = text.rstrip().splitlines()
    number = min(error.lineno or 1, len(lines))  # an error at the end is about the last line
    line = lines[number - 1].strip()
    reason = error.msg.splitlines()[-1].strip(" .")
    grammar = _IMPORT_GRAMMAR if line.startswith(("import ", "from ")) else _GRAMMAR
    raise ConfigurationError(
      f"{source.place(number)}: cannot read {line!r} ({reason}); {grammar}"
    ) from error
  except tokenize.TokenError as error:
    message, (line, _) = error.args
    raise ConfigurationError(
      f"{source.place(line)}: {message}; close the bracket or quote that is open there"
    ) from error


def _imported(name: str, is_from: bool, place: str) -> Symbol:
  """What `import name`, or `from a.b import c` with name a.b.c, gives."""
  parent, _, last = name.rpartition(".")
  if is_from:
    owner = _imported(parent, False, place)
    if hasattr(owner.value, last):
      return owner.attribute(last)
  try:
    return Symbol(name, (), importlib.import_module(name))
  except ModuleNotFoundError as error:
    if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
      raise ConfigurationError(
        f"{place}: importing {name} failed: {error}; install what is missing"
      ) from error
    if not parent:
      raise ConfigurationError(
        f"{place}: there is no module {name!r}; correct the name, or install the package it is in"
      ) from error
    owner = _imported(parent, False, place)
    raise ConfigurationError(
      f"{place}: {parent} has no {last!r}" + nearest(last, _public(owner.value))
    ) from error


def _public(value: Any) -> list[str]:
  return [name for name in dir(value) if not name.startswith("_")]


def _find(path: Path, folders: Sequence[Path], what: str) -> Path:
  """The first of `folders` that has the file `path` (an absolute path stands for itself)."""
  path = path.expanduser()
  folders = list(dict.fromkeys(folders))
  for folder in folders:
    if (folder / path).is_file():
      return (folder / path).resolve()
  looked_in = "" if path.is_absolute() else f" in {', '.join(map(_shown, folders))}"
  near = [name for folder in folders for name in _gin_files_around(folder, path)]
  raise ConfigurationError(
    f"{what} {str(path)!r}: there is no such file{looked_in}{nearest(str(path), near)}"
  )


def _gin_files_around(folder: Path, path: Path) -> list[str]:
  """gin files in and below the nearest folder of `path` that exists, named the way `path` is."""
  wanted = folder / path
  nearest_folder = next((parent for parent in wanted.parents if parent.is_dir()), None)
  if nearest_folder is None:
    return []
  found = [*nearest_folder.glob("*.gin"), *nearest_folder.glob("*/*.gin")]
  return [str(file) if path.is_absolute() else os.path.relpath(file, folder) for file in found]


def _shown(path: Path) -> str:
  """A path the way one would type it: relative where it lies below the working directory."""
  relative = os.path.relpath(path)
  return str(path) if relative.startswith("..") else relative
