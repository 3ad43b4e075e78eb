"""Logical axes to mesh axes: the only such table.

A parameter or an activation names its axes by what they mean ("embed", "heads", "batch"); the
tables below say which mesh axis cuts each. There is one table a parallelism, and a parallelism is
chosen by giving its mesh axis more than one device: an axis of size 1 cuts nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# mesh axis -> the logical axes that it cuts
TABLES: dict[str, tuple[str, ...]] = {
  "data": ("batch",),
  "fsdp": (
    "batch",
    "embed",
  ),  # ZeRO-3: parameters are cut along the model width and gathered where they are used
  "tensor": (
    "heads",
    "mlp",
    "vocab",
    "channels",
  ),  # Megatron: whole heads, columns of the MLP, rows of the vocabulary
  # Rows along their length; where an op needs all of it, it takes channels of whole rows instead.
  # The devices of a row cut parameters as those of fsdp do.
  "sequence": ("length", "channels", "embed"),
}
MESH_AXES = tuple(TABLES)


def make_mesh(
  *,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  sequence: int = 1,
  slices: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh with the axes data, fsdp, tensor and sequence.

  Args:
    data, fsdp, tensor, sequence: devices along each axis within one slice; at most one may be -1,
      which takes what the others leave.
    slices: TPU slices that are joined over the data centre network. The data axis goes across them
      outermost, with `slices` times `data` places, so that nothing but sums of gradients takes that
      way. Devices that tell of no slices are cut into so many runs of neighbours.
    devices: the devices to arrange; None means all that this program sees.
  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the devices lie on another
      number of slices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_shape(
    len(devices), data=data, fsdp=fsdp, tensor=tensor, sequence=sequence, slices=slices
  )
  types = (AxisType.Auto,) * len(shape)
  if devices[0].platform != "tpu":
    # In the order of ids, neighbours first: where a GPU calls its host a slice, jax.make_mesh would
    # refuse several hosts.
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)
  parts: dict[int, list[jax.Device]] = {}
  for device in devices:
    parts.setdefault(getattr(device, "slice_index", 0), []).append(device)
  if len(parts) != slices:
    raise ValueError(
      f"make_mesh: slices={slices}, and the devices lie on {len(parts)} — expected as many — set "
      f"make_mesh.slices = {len(parts)}"
    )
  of_a_slice = (shape[0] // slices, *shape[1:])
  placed = [
    # An axis of 2 on a torus of 4x4x4 takes half of a ring.
    mesh_utils.create_device_mesh(of_a_slice, part, allow_split_physical_axes=True)
    for _, part in sorted(parts.items())
  ]
  return Mesh(np.concatenate(placed), MESH_AXES, axis_types=types)


def mesh_shape(
  devices: int, *, data: int, fsdp: int, tensor: int, sequence: int, slices: int
) -> tuple[int, ...]:
  """The sizes of the axes of `make_mesh` for a number of devices. Raises ValueError as it does."""
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
  text = ", ".join(f"{name}={size}" for name, size in sizes.items())
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(
      f"make_mesh: {text} — every size must be at least 1, and one of them may be -1 for the "
      "rest; set the others"
    )
  if slices < 1 or devices % slices:
    raise ValueError(
      f"make_mesh: slices={slices} does not divide {devices} devices — expected the number of TPU "
      "slices, 1 elsewhere — set slices to that"
    )
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if free:
    sizes[free[0]] = devices // slices // fixed
  if math.prod(sizes.values()) * slices != devices:
    of_each = f"each of {slices} slices of " if slices > 1 else ""
    raise ValueError(
      f"make_mesh: {text} does not fit {of_each}{devices // slices} devices — the sizes must "
      "multiply to that; -1 takes the rest"
    )
  sizes["data"] *= slices
  return tuple(sizes.values())


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh) -> PartitionSpec:
  """Where an array of these logical axes lies on a mesh.

  An array axis whose length the mesh axes do not divide stays whole, as does one that no table
  names.

  Args:
    axes: one logical name an array axis; None for an axis without one.
    shape: lengths of the array axes.
    mesh: the mesh, or an abstract one.
  """
  spec = (cuts(axis, length, mesh) or None for axis, length in zip(axes, shape, strict=True))
  return PartitionSpec(*spec)


def cuts(axis: str | None, length: int, mesh) -> tuple[str, ...]:
  """The mesh axes that cut an array axis of this logical name and length; see `partition_spec`."""
  names = tuple(name for name, cut in TABLES.items() if axis in cut and mesh.shape.get(name, 1) > 1)
  return names if length % math.prod(mesh.shape[name] for name in names) == 0 else ()


def ways(axis: str) -> int:
  """Into how many parts the tables cut a logical axis on the mesh of `jax.set_mesh`; 1 without a
  mesh."""
  mesh = _mesh()
  if mesh is None:
    return 1
  return math.prod(mesh.shape.get(name, 1) for name, cut in TABLES.items() if axis in cut)


def is_cut(axis: str, length: int) -> bool:
  """Whether the mesh of `jax.set_mesh` cuts an array axis of this logical name and length."""
  count = ways(axis)
  return count > 1 and length > 0 and length % count == 0


def named_sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """The sharding of an array of these logical axes on a mesh; see `partition_spec`."""
  return NamedSharding(mesh, partition_spec(axes, shape, mesh))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation to the tables, under `jax.set_mesh`; without a mesh it returns x."""
  mesh = _mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def gather(x: jax.Array, axes: Sequence[str | None], *, whole: str) -> jax.Array:
  """Makes one axis of a parameter whole on every device before it is used; under `jax.set_mesh`.

  Its gradient is summed over the devices into the parts that they hold (a reduce-scatter), where
  `constrain` alone would sum all of it on every device.

  Args:
    axes: logical axes of x, cut as the tables say.
    whole: the axis to gather.
  """

  @jax.custom_vjp
  def gathered(x):
    return constrain(x, *(None if name == whole else name for name in axes))

  gathered.defvjp(
    lambda x: (gathered(x), None), lambda _, cotangent: (constrain(cotangent, *axes),)
  )
  return gathered(x)


def shard_kernel(
  function: Callable, in_axes: Sequence[tuple], out_axes: tuple | Sequence[tuple]
) -> Callable:
  """Runs a kernel on each device's own part, since the compiler cannot partition a kernel.

  Args:
    function: takes arrays (or None) and returns one array or several.
    in_axes: logical axes of each argument.
    out_axes: logical axes of the result, or of each where there are several; None for one that is
      None.
  Returns:
    The function under `jax.shard_map` on the mesh of `jax.set_mesh`; the function itself where
    there is none, or inside another function that is run so.
  """
  mesh = _mesh()
  if mesh is None:
    return function

  def sharded(*arrays):
    # Two arrays that share an axis must be cut alike, so an axis is whole everywhere as soon as one
    # array needs it whole.
    whole = {
      axis
      for axes, x in zip(in_axes, arrays, strict=True)
      if x is not None
      for axis, cut in zip(axes, partition_spec(axes, x.shape, mesh), strict=True)
      if cut is None
    }

    def spec(axes):
      kept = tuple(None if axis in whole else axis for axis in axes)
      return partition_spec(kept, [mesh.size] * len(kept), mesh)  # divisible by construction

    in_specs = tuple(
      None if x is None else spec(axes) for axes, x in zip(in_axes, arrays, strict=True)
    )
    several = isinstance(out_axes[0], tuple)
    out_specs = (
      spec(out_axes)
      if not several
      else tuple(None if axes is None else spec(axes) for axes in out_axes)
    )
    return jax.shard_map(
      function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*arrays)

  return sharded


def _mesh():
  """The mesh of `jax.set_mesh` where arrays are cut over it: None without one, for one device, and
  inside `jax.shard_map`, where arrays are a device's own."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def batch_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
  """Where an array of a batch lies: cut along the batch, and [B, T] along the length too."""
  axes = ("batch", "length") if len(shape) == 2 else ("batch", *(None,) * (len(shape) - 1))
  return named_sharding(axes, shape, mesh)


def batch_share(rows: int, mesh: Mesh) -> tuple[int, int]:
  """Which part of every batch this process has to read, as (index, count).

  Processes whose devices hold the same rows, as along a tensor axis, have the same index. Where
  processes share some rows and not others, and where the rows are not cut, each reads the whole
  batch: (0, 1).

  Args:
    rows: of a batch, over all processes.
  """
  shares, index = _shares(rows, mesh)
  return index, len(shares)


def put_batch(
  batch: dict[str, np.ndarray], mesh: Mesh, *, rows: int | None = None
) -> dict[str, jax.Array]:
  """Puts a batch on the mesh as one global array a key; see `batch_sharding`.

  Args:
    batch: arrays [B, ...], equal in all processes; with `rows`, of this process's share of them.
    rows: B, where the arrays hold the share that `batch_share` says.
  """
  whole = rows is None
  rows = len(next(iter(batch.values()))) if whole else rows
  shares, index = _shares(rows, mesh)
  block = rows // sum(map(len, shares))
  place = {first: first if whole else i * block for i, first in enumerate(shares[index])}

  def put(x: np.ndarray) -> jax.Array:
    shape = (rows, *x.shape[1:])

    def part(where: tuple[slice, ...]) -> np.ndarray:
      first = place[where[0].indices(rows)[0]]
      return x[(slice(first, first + block), *where[1:])]

    return jax.make_array_from_callback(shape, batch_sharding(shape, mesh), part)

  return {name: put(x) for name, x in batch.items()}


@functools.cache
def _shares(rows: int, mesh: Mesh) -> tuple[list[tuple[int, ...]], int]:
  """The shares of a batch, each as the first rows of the blocks in it, and which is ours."""
  held: dict[int, set[int]] = {}
  blocks = named_sharding(("batch",), (rows,), mesh).devices_indices_map((rows,))
  for device, (block,) in blocks.items():
    held.setdefault(device.process_index, set()).add(block.indices(rows)[0])
  shares = sorted({tuple(sorted(firsts)) for firsts in held.values()})
  every = sorted(set().union(*shares))
  apart = sum(map(len, shares)) == len(every)
  if not apart or len({len(firsts) for firsts in shares}) > 1:
    return [tuple(every)], 0
  return shares, shares.index(tuple(sorted(held[jax.process_index()])))
