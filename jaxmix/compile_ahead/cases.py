"""The cases of pallas_kernels as programs: an op on abstract arrays, forward, or forward and
backward, and JAX's own attention kernels at the same sizes."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from jaxmix import ops
from jaxmix.compile_ahead.process import Task
from jaxmix.compile_ahead.targets import Target
from pallas_kernels.long_convolution import folded

DIRECTIONS = ("forward", "forward_backward")
BASELINE = "jax_flash_attention"  # JAX's own, the implementation beside each op
IMPLEMENTATIONS = ("tpu", "gpu", "xla", BASELINE)


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

  @property
  def attention_shape(self) -> tuple[int, ...] | None:
    """[B, T, H, K] of the attention that stands beside the op: of q; or of heads of 64 in the width
    of a long convolution. None where there is none."""
    if self.op == "long_convolution":
      *rows, channels = self.shapes["u"]
      return (*rows, channels // 64, 64)
    return self.shapes.get("q")

  def program(self, chip: Target) -> tuple[Callable, tuple[Any, ...]]:
    """(function, abstract arguments), the cotangent of y last where it runs backward."""
    function, arrays = self._parts(chip)
    if self.direction == "forward":
      return function, (arrays,)
    return functools.partial(_both, function), (arrays, self._result(chip))

  def _result(self, chip: Target) -> jax.ShapeDtypeStruct:
    """y. By the XLA form, since kernels may not fit a chip that is not known yet."""
    form = self
    if self.implementation != BASELINE:
      form = dataclasses.replace(self, implementation="xla")
    return jax.eval_shape(*form._parts(chip))

  def _parts(self, chip: Target) -> tuple[Callable, dict]:
    """The op forward, and its abstract arrays."""
    if self.implementation == BASELINE:
      return _baseline(self.attention_shape, self.dtype, chip)
    return self._op()

  def least_seconds(self, chip: Target) -> float:
    """The least time that any program for the op takes on a chip: the larger of two.

    Bytes: the arrays that the op takes and returns, each once, at the bandwidth of HBM. Flops:
    those of its definition, at the peak of the matrix units: a memory written, read and, by the
    delta rule, read at the key, token by token; of attention the causal pairs; of Grassmann mixing
    the projection. Backward is another
    pass: it takes the arrays and the cotangent, returns the gradients, and has twice the flops.
    Saved states, what a kernel reads again, and the products of chunks are no part of it.
    """
    _, arrays = self._parts(chip)
    y = self._result(chip)
    taken, returned = _bytes(arrays), _bytes(y)
    flops = self._flops(chip)
    if self.direction == "forward_backward":
      numbers = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
      taken, returned = 2 * taken + returned, returned + _bytes(numbers)
      flops *= 3
    return max((taken + returned) / chip.hbm_bandwidth, flops / chip.matmul_flops)

  def _flops(self, chip: Target) -> int:
    """Of the definition, forward, a multiply-add counted as two."""
    shapes = self.shapes
    if self.op == "attention" or self.implementation == BASELINE:
      batch, length, heads, key_dim = self.attention_shape
      value_dim = shapes["v"][-1] if "v" in shapes else key_dim
      return 2 * batch * heads * length * (length + 1) // 2 * (key_dim + value_dim)
    if self.op == "grassmann":
      return 2 * math.prod(shapes["z"][:2]) * math.prod(shapes["weight"])
    if self.op == "long_convolution":
      # Of a GPU, the decomposition that a TPU with the memory of most has.
      vmem = chip.core.vmem_bytes if chip.platform == "tpu" else 2**27
      return folded.matmul_flops(shapes["u"], self.dtype, vmem)
    if self.op not in ("linear_attention", "delta_rule"):
      return 0
    batch, length, states, value_dim = shapes["v"]
    readers = max(states, shapes["q"][2])
    touched = states + readers + (states if self.op == "delta_rule" else 0)
    return 2 * batch * length * touched * shapes["q"][3] * value_dim

  def _op(self) -> tuple[Callable, dict[str, jax.ShapeDtypeStruct]]:
    case = find_case(self.op, self.case)
    arrays = {
      name: jax.ShapeDtypeStruct(shape, "float32" if name in case.float32 else self.dtype)
      for name, shape in case.shapes().items()
    }
    if (ids := case.segment_ids()) is not None:
      arrays["segment_ids"] = jax.ShapeDtypeStruct(ids.shape, jnp.int32)
    call = functools.partial(
      op_function(self.op),
      **case.options(),
      implementation=self.implementation,
    )
    return functools.partial(_forward, call), arrays


def _bytes(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _forward(call: Callable, arrays: dict) -> jax.Array:
  return call(**arrays)[0]


def _both(function: Callable, arrays: dict, cotangent: jax.Array):
  """y and the gradients of every array of numbers."""
  ids = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.integer)}
  numbers = {name: x for name, x in arrays.items() if name not in ids}
  y, pull = jax.vjp(lambda numbers: function({**numbers, **ids}), numbers)
  return y, pull(cotangent)


def op_function(op: str) -> Callable:
  """The op whose kernels are in pallas_kernels/<op>; it takes the arrays of a case by name."""
  return getattr(ops, {"grassmann": "grassmann_mix"}.get(op, op))


def op_names() -> tuple[str, ...]:
  """The ops that have kernels, or are to have them."""
  folders = pkgutil.iter_modules(pallas_kernels.__path__)
  return tuple(folder.name for folder in folders if folder.ispkg)


def find_case(op: str, name: str):
  """A case of an op by its name.

  Raises:
    ValueError: the op has no such case.
  """
  known = _cases(op)
  if name not in known:
    raise ValueError(f"{op} has no case {name!r} — it has {', '.join(known)} — name one of these")
  return known[name]


def cases_of(ops: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """Op -> those of the names that are cases of it; the ops that have none of them are left out.

  Args:
    names: of cases; empty means all of every op.
  Raises:
    ValueError: an op does not exist, or none of them has a case of that name.
  """
  for op in ops:
    _check_op(op)
  for name in names:
    if not any(name in _cases(op) for op in ops):
      find_case(ops[0], name)
  found = {op: tuple(name for name in names or _cases(op) if name in _cases(op)) for op in ops}
  return {op: chosen for op, chosen in found.items() if chosen}


def _cases(op: str) -> dict:
  cases = importlib.import_module(f"pallas_kernels.{op}.cases")
  return {case.name: case for case in (*cases.CASES, *cases.BENCHMARKS)}


def _check_op(op: str) -> None:
  if op not in op_names():
    raise ValueError(f"no op {op!r} — expected one of {', '.join(op_names())} — name one of these")


def case_programs(
  op: str,
  chip: Target,
  *,
  names: Sequence[str] = (),
  dtype: str = "bfloat16",
  implementations: Sequence[str] = (),
) -> tuple[CaseProgram, ...]:
  """The programs of an op for a chip: its kernel on every case, and on the cases of the benchmarks
  the XLA form and JAX's own flash attention beside it.

  Args:
    names: of cases; empty means all.
    implementations: "tpu", "gpu", "xla", BASELINE; empty means all.
  Raises:
    ValueError: the op, a case or an implementation does not exist.
  """
  _check_op(op)
  cases = importlib.import_module(f"pallas_kernels.{op}.cases")
  kernel = "tpu" if chip.platform == "tpu" else "gpu"
  has_kernel = importlib.util.find_spec(f"pallas_kernels.{op}.{kernel}") is not None
  benchmarks = {case.name for case in cases.BENCHMARKS}
  chosen = [find_case(op, name) for name in names or _cases(op)]
  if unknown := sorted({*implementations} - {*IMPLEMENTATIONS}):
    raise ValueError(
      f"no implementation {unknown[0]!r} — expected some of {', '.join(IMPLEMENTATIONS)} — name "
      "these"
    )
  programs = []
  for case in chosen:
    beside = ("xla",) if case.name in benchmarks else ()
    if beside and CaseProgram(op, case.name, "forward", BASELINE, dtype).attention_shape:
      beside = (*beside, BASELINE)
    for implementation in (*([kernel] if has_kernel else []), *beside):
      for direction in DIRECTIONS:
        if not implementations or implementation in implementations:
          programs.append(CaseProgram(op, case.name, direction, implementation, dtype))
  return tuple(programs)


def baselines_once(
  programs: Iterable[tuple[CaseProgram, Target]],
) -> list[tuple[CaseProgram, Target]]:
  """The programs without the repeated ones of JAX's attention, which takes three arrays of one
  shape whatever the op and its decay."""
  found, known = [], set()
  for case, chip in programs:
    if case.implementation == BASELINE:
      what = (chip.name, case.attention_shape, case.direction, case.dtype)
      if what in known:
        continue
      known.add(what)
    found.append((case, chip))
  return found


def _baseline(shape: tuple[int, ...], dtype: str, chip: Target) -> tuple[Callable, dict]:
  """JAX's own fused causal attention, in the layout that it takes."""
  batch, length, heads, key_dim = shape
  if chip.platform == "tpu":
    # The blocks with which its schedules were the fastest, of 256, 512, 1024 and 2048.
    small = length <= 2048 and chip.core.matrix_unit_size == 128
    function = functools.partial(_flash_tpu, min(512 if small else 1024, length))
    sizes = (batch, heads, length, key_dim)
  else:
    function, sizes = _flash_gpu, (batch, length, heads, key_dim)
  return function, {name: jax.ShapeDtypeStruct(sizes, dtype) for name in "qkv"}


def _flash_tpu(side: int, arrays: dict) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import flash_attention as flash

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

  function, arguments = case.program(chip)
  jitted, arguments, mesh, figures = abstract_program(function, arguments, chip)
  if chip.platform == "tpu":
    # Inside a model the products around an op write and read its arrays in the order that it wants.
    # Alone, it would be charged for the transposes to its own.
    free = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(function, in_shardings=free, out_shardings=free)
  return jitted, arguments, mesh, figures
