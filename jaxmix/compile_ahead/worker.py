"""The process in which a program is compiled: its environment was set before jax was imported.

Run as `python -m jaxmix.compile_ahead.worker RESULT DUMPS`; the task comes on standard input.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from importlib import metadata

import cloudpickle
import jax
from jax.sharding import Mesh, NamedSharding

from jaxmix.compile_ahead import cost, hlo, mesh_of, pallas, tpu_schedule
from jaxmix.compile_ahead.communication import collectives
from jaxmix.compile_ahead.process import Task, cached, keep
from jaxmix.compile_ahead.ptx import read_kernels
from jaxmix.compile_ahead.report import Memory, Report
from jaxmix.compile_ahead.targets import Target, target


def main() -> None:
  """Compiles the task on standard input and writes its report, or why there is none."""
  result, dumps = map(pathlib.Path, sys.argv[1:3])
  task = cloudpickle.load(sys.stdin.buffer)
  result.write_text(_report(task, dumps))


def _report(task: Task, dumps: pathlib.Path) -> str:
  chip = target(task.target)
  started = time.perf_counter()
  function, arguments, mesh, figures = task.program(chip)
  with jax.set_mesh(mesh):
    traced = function.trace(*arguments)
    lowered = traced.lower()
    text = lowered.as_text()
    lowered_at = time.perf_counter()
    versions = _versions(chip)
    key = _key(task, text, versions)
    if (known := cached(key)) is not None:
      return known
    compiled = lowered.compile()
  compiled_at = time.perf_counter()
  program = compiled.as_text()
  module = hlo.parse(program)
  counted = cost.count(module)
  schedule = kernels = None
  calls = pallas.pallas_calls(traced.jaxpr) if task.schedule else ()
  if task.schedule and chip.platform == "tpu":
    schedule = tpu_schedule.read_schedule(dumps, module, calls, chip, counted.xla_flops)
  elif task.schedule:
    fusions = task.schedule == "everything"
    kernels = read_kernels(dumps, program, chip, calls=calls, fusions=fusions)
  report = Report(
    target=chip.name,
    versions=versions,
    mesh=dict(mesh.shape),
    figures=figures,
    lower_seconds=lowered_at - started,
    compile_seconds=compiled_at - lowered_at,
    memory=_memory(compiled.memory_analysis(), chip),
    flops=counted.flops,
    hbm_bytes=counted.hbm_bytes,
    collectives=collectives(module, _of_a_slice(mesh)),
    pallas_kernels=counted.kernels,
    unpriced=tuple(counted.unpriced),
    unknown_loops=tuple(module.unknown_loops),
    saved_activations=counted.saved_activations,
    stacked_gradients=counted.stacked_gradients,
    schedule=schedule,
    gpu_kernels=kernels,
  ).to_json()
  keep(key, report)
  return report


def _of_a_slice(mesh: Mesh) -> dict[str, int]:
  """The mesh within one slice, whose devices alone a compiled program names: axis -> size."""
  slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
  (outermost, size), *rest = mesh.shape.items()
  return {outermost: size // slices, **dict(rest)}


def _memory(stats, chip: Target) -> Memory:
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
    peak=stats.peak_memory_in_bytes,
    capacity=chip.hbm_bytes,
  )


def _versions(chip: Target) -> dict[str, str]:
  compiler = "libtpu" if chip.platform == "tpu" else "jax-cuda12-plugin"
  return {name: metadata.version(name) for name in ("jax", "jaxlib", compiler)}


def _key(task: Task, text: str, versions: dict[str, str]) -> str:
  """Changes with the program, the target, the compiler, and how its output is read here."""
  package = pathlib.Path(__file__).parent
  sources = [path.read_text() for path in sorted(package.glob("*.py"))]
  how = [task.target, str(task.schedule), task.flags]
  parts = [text, *how, json.dumps(versions), *sources]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def abstract_program(function, arguments, chip: Target, donate_argnums: Sequence[int] = ()):
  """A function and its abstract arguments on the devices of a target, as a `Task` wants them."""
  abstract = mesh_of(arguments)
  mesh = jax.make_mesh(
    abstract.axis_sizes,
    abstract.axis_names,
    axis_types=abstract.axis_types,
    devices=chip.devices(),
  )
  jitted = jax.jit(function, donate_argnums=donate_argnums)
  return jitted, jax.tree.map(lambda x: _placed(x, mesh), arguments), mesh, {}


def _placed(x, mesh: Mesh) -> jax.ShapeDtypeStruct:
  spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else jax.P()
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


if __name__ == "__main__":
  main()
