"""Compiling for machines that you do not have: does it fit, what does it cost, what does it send.

    x = jax.ShapeDtypeStruct((4, 4096, 16, 128), jnp.bfloat16)
    compile_ahead.memory(fn, (x,), "v5e").fits
    compile_ahead.schedule(fn, (x,), "v5e").kernels

Arguments are abstract. On several devices each has a `NamedSharding` over a
`jax.sharding.AbstractMesh` of the target's size. Programs are compiled in processes of their own,
once for each program, target and compiler: what they told is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import cloudpickle
import jax
from jax.sharding import AbstractMesh, NamedSharding

from jaxmix.compile_ahead.communication import Collective
from jaxmix.compile_ahead.compilers import installed
from jaxmix.compile_ahead.process import (
  CompileError,
  CompilerMissing,
  Task,
  compile_all,
  compile_one,
)
from jaxmix.compile_ahead.ptx import GpuKernel
from jaxmix.compile_ahead.report import Bound, Memory, Report
from jaxmix.compile_ahead.targets import Target, target
from jaxmix.compile_ahead.targets import target as find_target
from jaxmix.compile_ahead.tpu_schedule import Piece, Schedule


def report(
  fn: Callable,
  args: Sequence,
  target: str,
  *,
  schedule: str | None = None,
  donate_argnums: Sequence[int] = (),
) -> Report:
  """Everything that compiling `fn(*args)` for a target tells.

  Args:
    fn: a function of arrays, before `jax.jit`. It is sent to another process: what it refers to
      must be importable there, or be defined with it.
    args: pytrees of jax.ShapeDtypeStruct.
    target: such as "v5e:4x4", "h100:8"; see `jaxmix.compile_ahead.target`.
    schedule: None, "kernels" or "everything": what else to read; see `Task`.
    donate_argnums: as of `jax.jit`: arguments whose memory the results may take.
  Raises:
    CompileError: the compiler refuses it; the message is the compiler's.
    CompilerMissing: the compiler is not installed; the message says what to install.
    ValueError: no such target, or the arguments lie on a mesh of another size.
  """
  asked = task(fn, args, target, schedule=schedule, donate_argnums=donate_argnums)
  return _compiled(cloudpickle.dumps(asked))


def task(
  fn: Callable,
  args: Sequence,
  target: str,
  *,
  schedule: str | None = None,
  donate_argnums: Sequence[int] = (),
) -> Task:
  """`report(fn, args, target)` as one of several for `compile_all`."""
  chip, mesh = find_target(target), mesh_of(args)
  if chip.slices > 1:
    raise ValueError(
      f"{chip.name} has {chip.slices} slices — expected one: only the mesh of a run says what goes "
      f"across slices — name {chip.chip}:{chip.topology}, or compile a run"
    )
  if mesh.size != chip.device_count:
    raise ValueError(
      f"the arguments lie on a mesh of {mesh.size} devices {dict(mesh.shape)}, and {chip.name} has "
      f"{chip.device_count} — expected as many — give them a NamedSharding over a "
      "jax.sharding.AbstractMesh of that size, or name another target"
    )
  if hasattr(fn, "lower"):
    raise ValueError(
      f"{fn!r} was given as jax.jit returned it, and cannot be sent to another process — expected "
      "the function itself — give what was jitted, and donate_argnums here"
    )
  program = functools.partial(_program, fn, tuple(args), tuple(donate_argnums))
  return Task(program, target, schedule)


def mesh_of(args: Sequence) -> AbstractMesh:
  """The mesh that abstract arguments lie on; one device where they name none."""
  shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(args))
  meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
  return next(meshes, AbstractMesh((1,), ("device",)))


def memory(
  fn: Callable, args: Sequence, target: str, *, donate_argnums: Sequence[int] = ()
) -> Memory:
  """Bytes of one device that `fn(*args)` needs on a target; see `report`."""
  return report(fn, args, target, donate_argnums=donate_argnums).memory


def collectives(fn: Callable, args: Sequence, target: str) -> tuple[Collective, ...]:
  """What `fn(*args)` sends between the devices of a target; see `report`."""
  return report(fn, args, target).collectives


def kernels(fn: Callable, args: Sequence, target: str) -> dict[str, int]:
  """The Pallas kernels of `fn(*args)` on a target, and how often each runs; see `report`."""
  return report(fn, args, target).pallas_kernels


def schedule(fn: Callable, args: Sequence, target: str) -> Schedule:
  """The static schedule of `fn(*args)` on a TPU; see `report`.

  Raises:
    ValueError: the target is no TPU.
  """
  found = report(fn, args, target, schedule="kernels").schedule
  if found is None:
    raise ValueError(
      f"{target} has no static schedule: only a TPU issues its instructions in a fixed order — "
      "expected a TPU — use gpu_kernels"
    )
  return found


def gpu_kernels(fn: Callable, args: Sequence, target: str) -> tuple[GpuKernel, ...]:
  """What the assembler says of the Pallas kernels of `fn(*args)` on a GPU; see `report`.

  Raises:
    ValueError: the target is no GPU.
  """
  found = report(fn, args, target, schedule="kernels").gpu_kernels
  if found is None:
    raise ValueError(f"{target} is no GPU — expected one such as h100 — use schedule")
  return found


def _program(fn: Callable, args: Sequence, donate_argnums: Sequence[int], chip: Target):
  from jaxmix.compile_ahead.worker import abstract_program  # exists in the other process only

  return abstract_program(fn, args, chip, donate_argnums)


@functools.lru_cache(maxsize=256)
def _compiled(pickled: bytes) -> Report:
  return compile_one(cloudpickle.loads(pickled))


__all__ = [
  "Bound",
  "Collective",
  "CompileError",
  "CompilerMissing",
  "GpuKernel",
  "Memory",
  "Piece",
  "Report",
  "Schedule",
  "Target",
  "Task",
  "collectives",
  "compile_all",
  "gpu_kernels",
  "installed",
  "kernels",
  "memory",
  "mesh_of",
  "report",
  "schedule",
  "target",
  "task",
]
