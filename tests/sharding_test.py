"""One table from logical axes to mesh axes, and the same run under every parallelism."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmix import sharding
from jaxmix.compile_ahead.targets import target
from jaxmix.mixers import Attention, LinearAttention
from jaxmix.models import Decoder
from jaxmix.training import TrainStep, adamw, muon

MESHES = {
  "data": {},
  "fsdp": {"data": 1, "fsdp": 8},
  "tensor": {"data": 4, "tensor": 2},
  "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
  "sequence": {"data": 1, "fsdp": 2, "sequence": 4},
}


@pytest.fixture(scope="module", autouse=True)
def devices():
  if jax.device_count() < 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": -1, "fsdp": -1}, "one of them may be -1"),
    ({"data": 0}, "every size must be at least 1"),
    ({"data": 3}, "data=3, fsdp=1, tensor=1, sequence=1 does not fit 8 devices"),
    ({"data": -1, "tensor": 3}, "does not fit 8 devices"),
    ({"data": 1, "sequence": 3}, "sequence=3 does not fit 8 devices"),
    ({"slices": 3}, "slices=3 does not divide 8 devices"),
    ({"slices": 2, "data": 1}, "data=1, .* does not fit each of 2 slices of 4 devices"),
  ],
)
def test_mesh_that_cannot_be_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


def test_free_axis_takes_the_rest():
  assert dict(sharding.make_mesh(tensor=2).shape) == {
    "data": 4,
    "fsdp": 1,
    "tensor": 2,
    "sequence": 1,
  }


def test_data_goes_across_slices_outermost():
  mesh = sharding.make_mesh(data=2, fsdp=2, slices=2)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
  of_a_slice = mesh.devices.reshape(2, 4)
  assert of_a_slice.tolist() == [jax.devices()[:4], jax.devices()[4:]]


def test_axes_lie_where_the_tables_say():
  mesh = sharding.make_mesh(**MESHES["mixed"])
  spec = functools.partial(sharding.partition_spec, mesh=mesh)
  assert spec(("batch", None), (8, 3)) == P(("data", "fsdp"), None)
  assert spec(("layers", "embed", "heads", "head"), (3, 8, 4, 2)) == P(None, "fsdp", "tensor", None)
  assert spec(("vocab", "embed"), (257, 8)) == P(None, "fsdp"), "2 does not divide 257"


def test_devices_of_a_row_cut_its_length_and_the_parameters():
  mesh = sharding.make_mesh(**MESHES["sequence"])
  assert sharding.batch_sharding((8, 24), mesh).spec == P("fsdp", "sequence")
  assert sharding.batch_sharding((8, 28, 28), mesh).spec == P("fsdp", None, None), "an image"
  spec = sharding.partition_spec(("embed", "heads", "head"), (32, 4, 8), mesh)
  assert spec == P(("fsdp", "sequence"), None, None)


def test_batch_lies_cut_over_the_devices():
  mesh = sharding.make_mesh(**MESHES["mixed"])
  batch = sharding.put_batch({"inputs": np.arange(24).reshape(8, 3)}, mesh)
  assert batch["inputs"].sharding.spec == P(("data", "fsdp"), None)
  np.testing.assert_array_equal(batch["inputs"], np.arange(24).reshape(8, 3))


def test_rows_of_tokens_are_cut_along_their_length_too():
  mesh = jax.make_mesh((2, 1, 1, 4), sharding.MESH_AXES)
  rows, labels = np.arange(32).reshape(4, 8), np.arange(4)
  batch = sharding.put_batch({"inputs": rows, "labels": labels}, mesh)
  assert batch["inputs"].sharding.spec == P("data", "sequence")
  assert {shard.data.shape for shard in batch["inputs"].addressable_shards} == {(2, 2)}
  np.testing.assert_array_equal(batch["inputs"], rows)
  np.testing.assert_array_equal(batch["labels"], labels)


@pytest.mark.parametrize(
  ("shape", "rows", "shares"),
  [
    ((16, 1, 1, 1), 16, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((1, 4, 2, 2), 8, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 1, 8, 1), 8, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two hosts hold the same rows
    ((2, 1, 2, 4), 8, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((1, 1, 16, 1), 8, [(0, 1)] * 4),
    ((16, 1, 1, 1), 12, [(0, 1)] * 4),  # not cut: every device holds all of it
  ],
)
def test_hosts_that_hold_the_same_rows_have_one_share(monkeypatch, shape, rows, shares):
  devices = sorted(target("v5e:4x4").devices(), key=lambda device: device.process_index)
  mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES)
  found = []
  for process in range(4):
    sharding._shares.cache_clear()
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    found.append(sharding.batch_share(rows, mesh))
  sharding._shares.cache_clear()
  assert found == shares


def test_kernel_sees_its_own_part():
  seen = []

  def kernel(x, ids):
    seen.append((x.shape, None if ids is None else ids.shape))
    return x * 2

  x = np.ones((8, 5, 3, 2), np.float32)
  axes = ("batch", None, "heads", None)
  with jax.set_mesh(sharding.make_mesh(**MESHES["mixed"])):
    run = sharding.shard_kernel(kernel, (axes, ("batch", None)), axes)
    y = jax.jit(lambda x: run(x, None))(x)
  assert seen == [((2, 5, 3, 2), None)], "four ways of batch; 3 heads stay whole on 2 devices"
  np.testing.assert_array_equal(y, 2 * x)


@pytest.fixture(scope="module")
def losses():
  """Losses of four steps by (optimizer, mesh, microbatches), and the last state."""
  mixers = {
    "linear_attention": functools.partial(LinearAttention, heads=4),
    "attention": functools.partial(Attention, heads=4, key_heads=2),
  }
  pattern = ("linear_attention", "attention")
  model = functools.partial(Decoder, 64, 32, 2, pattern=pattern, mixers=mixers, mlp_dim=64)
  tokens = np.random.default_rng(0).integers(0, 64, (16, 25)).astype(np.int32)
  segments = np.repeat([[1, 1, 1, 2, 2, 0]], 4, axis=1).repeat(16, axis=0)
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "weights": (np.arange(16 * 24).reshape(16, 24) % 5 != 0).astype(np.float32),
    "segment_ids": np.sort(segments, axis=1)[:, ::-1].astype(np.int32),
  }

  @functools.cache
  def run(optimizer, mesh, microbatches=1):
    mesh = sharding.make_mesh(**MESHES.get(mesh, {"devices": jax.devices()[:1]}))
    with jax.set_mesh(mesh):
      program = TrainStep(
        model,
        functools.partial(optimizer, learning_rate=1e-2),
        mesh=mesh,
        microbatches=microbatches,
      )
      state, found = program.init(0), []
      for _ in range(4):
        state, results = program.update(state, sharding.put_batch(batch, mesh))
        found.append(float(results["loss"]))
    return np.array(found), state

  return run


@pytest.mark.parametrize(
  ("optimizer", "mesh", "microbatches"),
  [*((adamw, mesh, 1) for mesh in MESHES), (muon, "mixed", 1), (adamw, "mixed", 2)],
)
def test_losses_are_those_of_one_device(losses, optimizer, mesh, microbatches):
  one, _ = losses(optimizer, "one")
  assert one[-1] < one[0] - 0.05, "nothing was learnt, so nothing is compared"
  # float32: sums in another order, carried through four updates of the size of the learning rate
  np.testing.assert_allclose(losses(optimizer, mesh, microbatches)[0], one, rtol=2e-5)


def test_parameters_and_moments_lie_together(losses):
  _, state = losses(adamw, "mixed")
  kernel = state["params"]["layers"]["0_linear_attention"]["mixer"]["q"]["kernel"]
  assert kernel.sharding.spec == P(None, "fsdp", "tensor", None)
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt_state"])
    if leaf.shape == kernel.shape and "'q'" in jax.tree_util.keystr(path)
  ]
  assert len(moments) >= 2
  specs = {moment.sharding.spec for moment in moments}
  assert specs == {kernel.sharding.spec}
