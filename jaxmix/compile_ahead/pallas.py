"""What the Pallas kernels of a traced function are asked to do: their grids and matmul flops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class PallasCall:
  """A kernel call as it was traced.

  Attributes:
    name: the one that it was given; "" for none.
    grid: steps along each axis.
    results: (dtype, shape) of each result.
    matmul_flops: 2 M N K of every product in it, over the whole grid; what stands under `pl.when`
      counts as often as its predicate holds.
    bytes_accessed: what its cost estimate says that one run reads and writes; None without one.
    upper_bound: a predicate or the length of a loop hangs on data; what it guards was counted as if
      it always ran, a loop once.
  """

  name: str
  grid: tuple[int, ...]
  results: tuple[tuple[str, tuple[int, ...]], ...]
  matmul_flops: int
  bytes_accessed: int | None
  upper_bound: bool


def pallas_calls(jaxpr) -> tuple[PallasCall, ...]:
  """The kernel calls anywhere inside a jaxpr, such as `jax.jit(fn).trace(*args).jaxpr`, each once.

  A call inside a loop is listed once, as is one inside a branch for another platform.
  """
  return tuple(_calls(getattr(jaxpr, "jaxpr", jaxpr)))


def _calls(jaxpr) -> Iterator[PallasCall]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield _call(equation)
    else:
      for inner in _inner(equation):
        yield from _calls(inner)


def _inner(equation) -> Iterator:
  """The jaxprs that an equation holds."""
  for value in equation.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _call(equation) -> PallasCall:
  params = equation.params
  grid = tuple(params["grid_mapping"].grid)
  if not all(isinstance(size, int | np.integer) for size in grid):
    return PallasCall(_name(params), grid, _results(equation), 0, _estimate(params), True)
  # Every grid step at once: the index along each axis as a flat array over the whole grid.
  steps = tuple(index.reshape(-1) for index in np.indices(grid)) if grid else ()
  count = math.prod(grid)
  flops, exact = _Counter(steps, grid, count).flops(params["jaxpr"], [], np.ones(count))
  estimate = _estimate(params)
  return PallasCall(_name(params), grid, _results(equation), round(flops), estimate, not exact)


def _estimate(params: dict) -> int | None:
  estimate = params.get("cost_estimate")
  return None if estimate is None else estimate.bytes_accessed


def _name(params: dict) -> str:
  # jax 0.10 to 0.12 keep the name under different keys.
  if name := params.get("name"):
    return str(name)
  source = params.get("name_and_src_info")
  return str(source.name) if source is not None and source.name else ""


def _results(equation) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple((str(out.aval.dtype), tuple(out.aval.shape)) for out in equation.outvars)


class _Counter:
  """Walks a kernel's body with the values that are known at every grid step.

  A value is an array over the grid steps, or a number; None stands for one that hangs on data.
  """

  def __init__(self, steps: tuple[np.ndarray, ...], grid: tuple[int, ...], count: int):
    self._steps, self._grid, self._count = steps, grid, count

  def flops(self, jaxpr, arguments: list, weight: np.ndarray) -> tuple[float, bool]:
    """Flops of a body that runs `weight` times at each step, and whether that is exact."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return self._walk(jaxpr, dict(zip(jaxpr.invars, arguments, strict=False)), weight)

  def _walk(self, jaxpr, values: dict, weight: np.ndarray) -> tuple[float, bool]:
    total, exact = 0.0, True
    for equation in jaxpr.eqns:
      known = [self._read(values, variable) for variable in equation.invars]
      added, sure = self._equation(equation, known, weight, values)
      total, exact = total + added, exact and sure
    return total, exact

  @staticmethod
  def _read(values: dict, variable):
    return variable.val if hasattr(variable, "val") else values.get(variable)

  def _equation(self, equation, known: list, weight: np.ndarray, values: dict):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      return 2 * depth * math.prod(equation.outvars[0].aval.shape) * weight.sum(), True
    if name in ("program_id", "num_programs"):
      source = self._steps if name == "program_id" else self._grid
      values[equation.outvars[0]] = source[params["axis"]]
      return 0.0, True
    if name == "cond":
      return self._cond(params["branches"], known, weight)
    if name == "scan":
      return self.flops(params["jaxpr"], self._once(params, known), weight * params["length"])
    if name == "while":
      once, _ = self.flops(params["body_jaxpr"], [], weight)
      return once, once == 0
    if inner := list(_inner(equation)):
      parts = [self._called(body, known, weight, equation.outvars, values) for body in inner]
      return sum(part for part, _ in parts), all(sure for _, sure in parts)
    self._scalar(equation, known, values)
    return 0.0, True

  def _called(self, body, known: list, weight: np.ndarray, results, values: dict):
    """A function that the body calls, such as jnp.where; what it returns may be known too."""
    inside = dict(zip(body.invars, known, strict=False))
    total, exact = self._walk(body, inside, weight)
    returned = (self._read(inside, variable) for variable in body.outvars)
    values.update((to, x) for to, x in zip(results, returned, strict=False) if x is not None)
    return total, exact

  @staticmethod
  def _once(params: dict, known: list) -> list:
    """What a loop's body is given: its constants are known, what it carries is not."""
    constants = params.get("num_consts", 0)  # jax 0.12 passes all of them as carried
    return [*known[:constants], *(None for _ in known[constants:])]

  def _cond(self, branches, known: list, weight: np.ndarray) -> tuple[float, bool]:
    index, *operands = known
    if index is None:  # the costliest branch at every step
      parts = [self.flops(branch, operands, weight) for branch in branches]
      flops = max(part for part, _ in parts)
      return flops, flops == 0
    index = np.broadcast_to(np.clip(index, 0, len(branches) - 1), (self._count,))
    parts = [
      self.flops(branch, operands, weight * (index == number))
      for number, branch in enumerate(branches)
    ]
    return sum(part for part, _ in parts), all(sure for _, sure in parts)

  def _scalar(self, equation, known: list, values: dict) -> None:
    """Computes a number at all grid steps, where what it depends on is known."""
    apply = _SCALARS.get(equation.primitive.name)
    if apply is None or any(value is None for value in known):
      return
    if getattr(equation.outvars[0].aval, "shape", None) == ():
      values[equation.outvars[0]] = apply(*known)


def _quotient(a, b):
  """Integer division towards zero, as lax.div does it."""
  return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.int64)


# The arithmetic of grid indices and predicates.
_SCALARS: dict[str, Callable] = {
  "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "sign": np.sign,
  "div": _quotient, "rem": np.fmod, "max": np.maximum, "min": np.minimum, "pow": np.power,
  "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
  "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
  "not": lambda a: np.logical_not(a) if np.asarray(a).dtype == bool else np.invert(a),
  "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift,
  "convert_element_type": lambda a: np.asarray(a).astype(np.int64),
  "select_n": lambda which, *cases: np.choose(np.asarray(which).astype(np.int64), cases),
  "clamp": lambda low, a, high: np.clip(a, low, high),
}  # fmt: skip
