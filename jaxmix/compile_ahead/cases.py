"""The cases of pallas_kernels as programs: an op on abstract arrays, forward, or forward and
backward, and JAX's own attention kernels at the same sizes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from jaxmix import ops
from jaxmix.compile_ahead.process import Task
from jaxmix.compile_ahead.targets import Target

DIRECTIONS = ("forward", "forward_backward")
BASELINE = "jax_flash_attention"  # JAX's own, the implementation beside each op


@dataclasses.dataclass(frozen=True)
class CaseProgram:
  """An op at the sizes of a case.

  Attributes:
    op: name of the op.   case: of the case.   direction: one of DIRECTIONS.
    implementation: "tpu", "gpu", "xla" or BASELINE.
    dtype: of the arrays but those that are float32 always.
  """

  op: str
  case: str
  direction: str
  implementation: str
  dtype: str

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of the arrays of the case."""
    return find_case(self.op, self.case).shapes()

  def program(self, platform: str) -> tuple[Callable, tuple[Any, ...]]:
    """(function, abstract arguments), the cotangent of y last where it runs backward."""
    if self.implementation == BASELINE:
      function, arrays = _baseline(self.shapes["q"], self.dtype, platform)
    else:
      function, arrays = self._op()
    if self.direction == "forward":
      return function, (arrays,)
    y = jax.eval_shape(function, arrays)
    return functools.partial(_both, function), (arrays, y)

  def _op(self) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct]]:
    case = find_case(self.op, self.case)
    arrays = {
      name: jax.ShapeDtypeStruct(shape, "float32" if name in case.float32 else self.dtype)
      for name, shape in case.shapes().items()
    }
    if (ids := case.segment_ids()) is not None:
      arrays["segment_ids"] = jax.ShapeDtypeStruct(ids.shape, jnp.int32)
    call = functools.partial(
      getattr(ops, self.op), **case.options(), implementation=self.implementation
    )
    return functools.partial(_forward, call), arrays


def _forward(call: Callable, arrays: dict) -> jax.Array:
  return call(**arrays)[0]


def _both(function: Callable, arrays: dict, cotangent: jax.Array):
  """y and the gradients of every array of numbers."""
  ids = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.integer)}
  numbers = {name: x for name, x in arrays.items() if name not in ids}
  y, pull = jax.vjp(lambda numbers: function({**numbers, **ids}), numbers)
  return y, pull(cotangent)


def op_names() -> tuple[str, ...]:
  """The ops that have kernels."""
  folders = pkgutil.iter_modules(pallas_kernels.__path__)
  return tuple(folder.name for folder in folders if folder.ispkg)


def find_case(op: str, name: str):
  """A case of an op by its name.

  Raises:
    ValueError: the op has no such case.
  """
  cases = importlib.import_module(f"pallas_kernels.{op}.cases")
  known = {case.name: case for case in (*cases.CASES, *cases.BENCHMARKS)}
  if name not in known:
    raise ValueError(f"{op} has no case {name!r} — it has {', '.join(known)} — name one of these")
  return known[name]


def case_programs(
  op: str, chip: Target, *, names: tuple[str, ...] = (), dtype: str = "bfloat16"
) -> tuple[CaseProgram, ...]:
  """The programs of an op for a chip: its kernel on every case, and on the cases of the benchmarks
  the XLA form and JAX's own flash attention beside it.

  Args:
    names: of cases; empty means all.
  Raises:
    ValueError: the op or a case does not exist.
  """
  if op not in op_names():
    raise ValueError(f"no op {op!r} — expected one of {', '.join(op_names())} — name one of these")
  cases = importlib.import_module(f"pallas_kernels.{op}.cases")
  kernel = "tpu" if chip.platform == "tpu" else "gpu"
  has_kernel = importlib.util.find_spec(f"pallas_kernels.{op}.{kernel}") is not None
  benchmarks = {case.name for case in cases.BENCHMARKS}
  every = [case.name for case in (*cases.CASES, *cases.BENCHMARKS)]
  chosen = [find_case(op, name) for name in names or every]
  programs = []
  for case in chosen:
    beside = ("xla",) if case.name in benchmarks else ()
    if beside and "q" in case.shapes():
      beside = (*beside, BASELINE)
    for implementation in (*([kernel] if has_kernel else []), *beside):
      for direction in DIRECTIONS:
        programs.append(CaseProgram(op, case.name, direction, implementation, dtype))
  return tuple(programs)


def _baseline(shape: tuple[int, ...], dtype: str, platform: str) -> tuple[Callable, dict]:
  """JAX's own fused causal attention, in the layout that it takes."""
  batch, length, heads, key_dim = shape
  if platform == "tpu":
    function, sizes = _flash_tpu, (batch, heads, length, key_dim)
  else:
    function, sizes = _flash_gpu, (batch, length, heads, key_dim)
  return function, {name: jax.ShapeDtypeStruct(sizes, dtype) for name in "qkv"}


def _flash_tpu(arrays: dict) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import flash_attention as flash

  side = min(512, arrays["q"].shape[2])
  fields = [field.name for field in dataclasses.fields(flash.BlockSizes)]
  sizes = {name: 1 if name == "block_b" else side for name in fields}
  return flash.flash_attention(**arrays, causal=True, block_sizes=flash.BlockSizes(**sizes))


def _flash_gpu(arrays: dict) -> jax.Array:
  from jax.experimental.pallas.ops.gpu import attention

  return attention.mha(**arrays, segment_ids=None, causal=True)


def case_task(case: CaseProgram, chip: Target) -> Task:
  """The compilation of a case for a target."""
  schedule = "everything" if case.implementation == "xla" else "kernels"
  return Task(functools.partial(_program, case), chip.name, schedule)


def _program(case: CaseProgram, chip: Target):
  from jaxmix.compile_ahead.worker import abstract_program  # exists in the other process only

  return abstract_program(*case.program(chip.platform), chip)
