"""Which implementation of an op a program gets: chosen when the program is lowered, and explained
on request.

`implementation=None` gives each platform its own, so a CPU host that compiles for a pod gets the
pod's kernels. A name is a demand: it raises where it cannot be met.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Mapping

import jax

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")

_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}  # our name -> jax's name
_record: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("record", default=None)


def run(
  op: str,
  implementation: str | None,
  arrays: tuple,
  *,
  functions: Mapping[str, Callable],
  refusals: Mapping[str, str],
):
  """Calls one of `functions` on `arrays`, or lets the platform that the program is lowered for
  choose.

  Args:
    op: name of the op, for messages.
    implementation: None or one of IMPLEMENTATIONS.
    arrays: positional arguments of the functions.
    functions: implementation -> function; "reference" and "xla" always stand in it.
    refusals: implementation -> why it cannot run this call. A kernel that neither has a function
      nor a reason does not exist yet.
  Raises:
    ValueError: the name is unknown, or the implementation refuses this call.
  """
  missing = {name: f"{op} has no {name} kernel" for name in _PLATFORMS if name not in functions}
  refusals = {**missing, **refusals}
  if implementation is None:
    kernels = {name: functions[name] for name in _PLATFORMS if name not in refusals}
    _note(op, kernels, refusals)
    if not kernels:
      return functions["xla"](*arrays)
    branches = {_PLATFORMS[name]: function for name, function in kernels.items()}
    return by_platform(*arrays, default=functions["xla"], **branches)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{op}: implementation={implementation!r} is unknown; expected None or one of "
      f"{', '.join(IMPLEMENTATIONS)}"
    )
  if implementation in refusals:
    raise ValueError(
      f'{op}: implementation="{implementation}" cannot run this call: {refusals[implementation]}; '
      'use implementation="xla"'
    )
  return functions[implementation](*arrays)


def by_platform(*arrays, default: Callable, **branches: Callable):
  """Calls the branch (cpu, tpu, cuda) of the platform that the program is made for, or `default`.

  That is the platform of the devices in the mesh of `jax.set_mesh`. Without one every branch is
  traced and the choice is left to the lowering (`jax.lax.platform_dependent`); the programs of
  kernels are long, and tracing those of other platforms takes seconds.
  """
  platform = _platform_of_mesh()
  if platform is None:
    return jax.lax.platform_dependent(*arrays, default=default, **branches)
  return branches.get(platform, default)(*arrays)


def candidates(functions: Iterable[str], refusals: Mapping[str, str]) -> list[str]:
  """Those of the implementations that `run` may call where none is named."""
  platform = _platform_of_mesh()
  kernels = [name for name in _PLATFORMS if name in functions and name not in refusals]
  if platform is None:
    return ["xla", *kernels]
  return [name for name in kernels if _PLATFORMS[name] == platform] or ["xla"]


def _platform_of_mesh() -> str | None:
  """jax's name of the platform whose devices are in the mesh of `jax.set_mesh`; None without one,
  or for a mesh of no devices in particular."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else {"gpu": "cuda"}.get(device.platform, device.platform)


def explain_implementation(function: Callable, *args) -> list[str]:
  """Says which implementation each op inside `function` gets on each platform, and why not a kernel
  where it gets none.

  Args:
    function: any function of arrays that calls ops with `implementation=None`; it is traced, not
      run. Give it as it is before `jax.jit`, which would answer from its cache.
    args: its arguments: arrays or jax.ShapeDtypeStruct.
  Returns:
    One line an op and outcome, in order of first use, such as
    "attention: tpu -> tpu kernel; elsewhere -> xla (gpu: attention has no gpu kernel)".
  """
  with contextlib.ExitStack() as stack:
    lines: list[str] = []
    stack.callback(_record.reset, _record.set(lines))
    # A fresh function, so that nothing is answered from a cache.
    jax.eval_shape(lambda *args: function(*args), *args)
  return list(dict.fromkeys(lines))


def _note(op: str, kernels: Mapping[str, Callable], refusals: Mapping[str, str]) -> None:
  lines = _record.get()
  if lines is None:
    return
  chosen = [f"{name} -> {name} kernel" for name in kernels]
  why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
  lines.append(f"{op}: " + "; ".join([*chosen, "elsewhere -> xla"]) + (f" ({why})" if why else ""))
