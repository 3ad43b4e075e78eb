"""Checkpoints: bitwise, compared before they are read, and safe from kills and full disks."""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmix.training.checkpoints import CheckpointError, CheckpointMismatch, Checkpoints

DATA = {"next_index": 12, "fingerprint": "5f2c"}
CONFIG = "train.steps = 400\nDIM = 256\n"


def train_state(step: int = 0, width: int = 8, depth: int = 3) -> dict:
  """A state with what makes trouble: masked optimizer leaves, bfloat16, scalars and a typed key."""
  key = jax.random.fold_in(jax.random.key(0), step)
  params = {
    "layers": {"qkv": jax.random.normal(key, (depth, width, 24))},
    "embedding": jax.random.normal(key, (32, width), jnp.bfloat16),
  }
  groups = {"layers": {"qkv": "adamw"}, "embedding": "sgd"}
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.multi_transform({"adamw": optax.adamw(1e-3), "sgd": optax.sgd(1e-2)}, groups),
  )
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  return {"params": params, "opt_state": opt_state, "step": jnp.int32(step), "rng": key}


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_bitwise(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype
    if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
      one, other = jax.random.key_data(one), jax.random.key_data(other)
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def save(checkpoints: Checkpoints, step: int, **options) -> None:
  state = options.pop("state", None) or train_state(step)
  checkpoints.save(step, state, data=DATA, config=CONFIG, **options)


@pytest.fixture
def saved(tmp_path):
  """A folder with one checkpoint, of step 100."""
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  save(checkpoints, 100)
  checkpoints.wait()
  yield checkpoints
  checkpoints.close()


def test_a_state_returns_bitwise_with_its_position_and_configuration(saved):
  state, data = saved.restore(100, abstract(train_state()))
  assert_bitwise(state, train_state(100))
  assert data == DATA
  assert saved.config(100) == CONFIG
  another_process = Checkpoints(saved.directory, read_only=True)
  assert_bitwise(another_process.restore(100, abstract(train_state()))[0], train_state(100))
  another_process.close()


def test_a_leaf_without_a_sharding_is_placed_on_the_first_device(saved):
  state, _ = saved.restore(100, jax.eval_shape(train_state))
  assert_bitwise(state, train_state(100))


def test_donating_the_state_to_the_next_step_does_not_change_what_is_being_written(tmp_path):
  next_step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  state = {"params": {str(i): jnp.full(500_000, float(i)) for i in range(8)}}
  expected = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
  checkpoints = Checkpoints(tmp_path)
  save(checkpoints, 1, state=state)
  for _ in range(4):
    state = next_step(state)
  assert_bitwise(checkpoints.restore(1, abstract(state))[0], expected)
  checkpoints.close()


def test_the_newest_and_the_best_are_kept_and_a_step_without_a_figure_is_never_best(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2, keep_best=2)
  losses = {1: None, 2: 1.5, 3: 1.2, 4: None, 5: float("nan"), 6: 1.9, 7: None, 8: None}
  for step, loss in losses.items():
    save(checkpoints, step, state={"params": {"w": jnp.ones(step)}}, validation_loss=loss)
  assert checkpoints.steps() == [2, 3, 7, 8]
  assert (checkpoints.latest_step(), checkpoints.best_step()) == (8, 3)
  checkpoints.close()
  # What was measured is in the folder, not in the process that measured it.
  reopened = Checkpoints(tmp_path, keep=1, keep_best=1)
  save(reopened, 9, state={"params": {"w": jnp.ones(9)}})
  assert (reopened.steps(), reopened.best_step()) == ([3, 9], 3)
  reopened.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "9"]


def test_without_a_figure_there_is_no_best_step(saved):
  assert saved.best_step() is None


def test_parameters_come_without_the_optimizer_and_averaged_where_the_run_averaged(tmp_path, saved):
  params = train_state(100)["params"]
  assert_bitwise(saved.restore_parameters(100, abstract(params)), params)
  averaged = jax.tree.map(lambda x: x * 2, params)
  save(saved, 200, state={**train_state(100), "ema": averaged})
  assert_bitwise(saved.restore_parameters(200, abstract(params)), averaged)
  assert_bitwise(saved.restore_parameters(200, abstract(params), prefer="params"), params)
  with pytest.raises(ValueError, match="prefer='mean' is unknown — expected 'ema' or 'params'"):
    saved.restore_parameters(200, abstract(params), prefer="mean")
  with pytest.raises(CheckpointMismatch, match=r"params/layers/qkv: checkpoint float32\[3,8,24\]"):
    saved.restore_parameters(100, abstract(train_state(width=12)["params"]))


def test_a_mismatch_lists_shapes_dtypes_missing_and_unexpected_arrays(saved):
  wanted = abstract(train_state())
  wanted["params"] = {
    "layers": {"qkv": jax.ShapeDtypeStruct((3, 8, 32), jnp.float32)},
    "embedding": jax.ShapeDtypeStruct((32, 8), jnp.float32),
    "head": jax.ShapeDtypeStruct((8, 32), jnp.float32),
  }
  del wanted["rng"]
  with pytest.raises(CheckpointMismatch) as caught:
    saved.restore(100, wanted)
  assert str(caught.value).splitlines() == [
    f"checkpoint {saved.directory}/100 does not fit the model:",
    "  params/embedding: checkpoint bfloat16[32,8], the model wants float32[32,8]",
    "  params/head: checkpoint has nothing, the model wants float32[8,32]",
    "  params/layers/qkv: checkpoint float32[3,8,24], the model wants float32[3,8,32]",
    "  rng: checkpoint uint32[2], the model wants nothing",
    "use the model and the optimizer of the configuration saved beside the checkpoint, "
    "or start in another work directory",
  ]


def test_a_long_mismatch_is_cut_to_twelve_lines(saved):
  wanted = {"params": {f"w{i:02}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(30)}}
  with pytest.raises(CheckpointMismatch) as caught:
    saved.restore(100, wanted)
  lines = str(caught.value).splitlines()
  assert len(lines) <= 12
  assert lines[-2] == "  ... and 29 more"  # 30 missing and 7 that nobody wants, 8 of them listed


def test_missing_checkpoints_are_named_with_their_folder(tmp_path, saved):
  with pytest.raises(
    FileNotFoundError, match=r"no checkpoint in .*nowhere: there is no such folder"
  ):
    Checkpoints(tmp_path / "nowhere", read_only=True)
  assert not (tmp_path / "nowhere").exists()
  with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: none in it is complete"):
    Checkpoints(tmp_path / "new").restore(1, {})
  with pytest.raises(
    FileNotFoundError, match=r"no checkpoint of step 7 in .* it has steps \[100\]"
  ):
    saved.restore(7, {})


def test_a_damaged_checkpoint_says_which_folder_to_remove(saved):
  state = {"params": {"w": jnp.ones(1000)}}
  save(saved, 200, state=state)
  saved.wait()
  shutil.rmtree(saved.directory / "200" / "state" / "d")
  shutil.rmtree(saved.directory / "200" / "state" / "ocdbt.process_0")
  with pytest.raises(CheckpointError, match=r"200 cannot be read: .*continue from step 100"):
    saved.restore(200, abstract(state))


def test_steps_only_grow(saved):
  with pytest.raises(
    ValueError, match=r"cannot save step 100 in .* newest checkpoint is of step 100"
  ):
    save(saved, 100)
  reader = Checkpoints(saved.directory, read_only=True)
  with pytest.raises(ValueError, match="it was opened with read_only=True"):
    save(reader, 200)
  reader.close()


def test_a_position_that_json_cannot_hold_is_refused_before_anything_is_written(saved):
  with pytest.raises(TypeError, match="int64 is not JSON serializable"):
    saved.save(200, train_state(), data={"next": np.int64(3)}, config=CONFIG)
  assert saved.steps() == [100]


@pytest.mark.parametrize(
  ("options", "kind"),
  [({"keep": 0}, ValueError), ({"keep": "3"}, TypeError), ({"keep_best": -1}, ValueError)],
)
def test_the_numbers_to_keep_are_checked(tmp_path, options, kind):
  (name,) = options
  with pytest.raises(kind, match=f"{name}=.* — expected an integer of at least"):
    Checkpoints(tmp_path, **options)


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / "run").write_text("not a folder")
  with pytest.raises(NotADirectoryError, match=r"can go to .*/run: a file is in the way"):
    Checkpoints(tmp_path / "run")
  with pytest.raises(
    NotADirectoryError, match=r"can go to .*/run/checkpoints: a file is in the way"
  ):
    Checkpoints(tmp_path / "run" / "checkpoints")


def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path):
  folder = tmp_path / "locked"
  folder.mkdir(mode=0o555)
  administrator = os.geteuid() == 0
  if administrator:  # who may write anywhere, so the test becomes nobody for a moment
    os.seteuid(65534)
  try:
    with pytest.raises(
      PermissionError, match=r"can go to .*/locked: .* expected a writable folder"
    ):
      Checkpoints(folder)
  finally:
    if administrator:
      os.seteuid(0)


def test_a_half_written_checkpoint_is_ignored_and_only_a_trainer_removes_it(saved):
  half = pathlib.Path(f"{saved.directory}/200.orbax-checkpoint-tmp")
  shutil.copytree(saved.directory / "100", half)
  reader = Checkpoints(saved.directory, read_only=True)
  assert reader.latest_step() == 100
  reader.close()
  assert half.is_dir()
  trainer = Checkpoints(saved.directory)
  assert trainer.latest_step() == 100
  save(trainer, 200)
  trainer.close()
  assert sorted(path.name for path in saved.directory.iterdir()) == ["100", "200"]


def assert_a_failed_save_is_told_and_repaired(checkpoints, state, break_it, mend_it):
  save(checkpoints, 1, state=state)
  checkpoints.wait()
  break_it()
  save(checkpoints, 2, state=state)
  try:
    with pytest.raises(CheckpointError) as caught:
      save(checkpoints, 3, state=state)
  finally:
    mend_it()
  assert f"checkpoint {checkpoints.directory}/2 was not written" in str(caught.value)
  assert "it takes up to 8.0 MB" in str(caught.value)
  assert "MB were free when it began — free some space" in str(caught.value)
  assert str(caught.value).endswith("intact: steps [1]")
  assert_bitwise(checkpoints.restore(1, abstract(state))[0], state)
  save(checkpoints, 4, state=state)
  assert checkpoints.steps() == [1, 4]
  checkpoints.close()
  assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "4"]
  return str(caught.value)


@pytest.fixture(scope="module")
def incompressible():
  return {"params": {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}}


def test_a_failed_write_surfaces_at_the_next_save_and_does_not_stay(tmp_path, incompressible):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  assert_a_failed_save_is_told_and_repaired(
    Checkpoints(tmp_path),
    incompressible,
    lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard)),
    lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
  )


def test_a_full_disk_is_named_with_free_and_needed_bytes(tmp_path, incompressible):
  mount = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], capture_output=True, text=True
  )
  if mount.returncode:
    pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")
  filler = tmp_path / "filler"
  try:
    text = assert_a_failed_save_is_told_and_repaired(
      Checkpoints(tmp_path / "run"),
      incompressible,
      lambda: filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 3_000_000)),
      filler.unlink,
    )
    assert "No space left on device" in text
    assert "3.0 MB were free" in text
  finally:
    subprocess.run(["umount", tmp_path], check=True)


def run_python(code: str, *arguments, **environment) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_state_saved_on_eight_devices_is_restored_on_other_meshes(tmp_path):
  process = run_python(
    """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxmix.training.checkpoints import Checkpoints

    w = np.random.default_rng(0).standard_normal((16, 24), np.float32)
    tree = {"params": {"w": w, "b": np.arange(8, dtype=np.int32)}, "step": np.int32(5)}

    def placed(mesh, w_spec, b_spec):
      specs = {"params": {"w": w_spec, "b": b_spec}, "step": P()}
      return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    states = [
      placed(jax.make_mesh((8,), ("fsdp",)), P("fsdp"), P("fsdp")),
      placed(jax.make_mesh((2, 4), ("data", "tensor")), P("data", "tensor"), P()),
      placed(jax.sharding.Mesh(jax.devices()[3:4], ("fsdp",)), P("fsdp"), P()),
    ]
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(5, states[0], data={}, config="")
    for state in states:
      wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
      restored, _ = checkpoints.restore(5, wanted)
      for got, want, value in zip(*map(jax.tree.leaves, (restored, wanted, tree)), strict=True):
        assert got.sharding == want.sharding
        assert np.asarray(got).tobytes() == value.tobytes()
      params = checkpoints.restore_parameters(5, wanted["params"])
      assert params["w"].sharding == wanted["params"]["w"].sharding
    checkpoints.close()
    """,
    tmp_path,
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
  )
  _, errors = process.communicate(timeout=100)
  assert process.returncode == 0, errors


SAVE_UNTIL_KILLED = """
import sys
import jax, numpy as np
from jaxmix.training.checkpoints import Checkpoints

checkpoints = Checkpoints(sys.argv[1], keep=2)
step = (checkpoints.latest_step() or 0) + 1
w = np.random.default_rng(0).standard_normal((4, 2_000_000), np.float32)
while True:
  state = {"params": [jax.numpy.asarray(part * step) for part in w], "step": jax.numpy.int32(step)}
  checkpoints.save(step, state, data={"next": step}, config="")
  print(step, flush=True)
  step += 1
"""


def test_a_process_killed_while_it_saves_loses_at_most_that_checkpoint(tmp_path):
  w = np.random.default_rng(0).standard_normal((4, 2_000_000), np.float32)
  half_written = 0
  for saves, delay in [(1, 0.0), (2, 0.01), (3, 0.03), (2, 0.06)]:
    process = run_python(SAVE_UNTIL_KILLED, tmp_path)
    for _ in range(saves):
      started = int(process.stdout.readline())
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    half_written += any("orbax-checkpoint-tmp" in path.name for path in tmp_path.iterdir())

    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest_step()
    assert (step or 0) >= started - 1
    if step is not None:
      expected = {"params": [jnp.asarray(part * step) for part in w], "step": jnp.int32(step)}
      state, data = checkpoints.restore(step, abstract(expected))
      assert_bitwise(state, expected)
      assert data == {"next": step}
    checkpoints.close()
  assert half_written, "no kill fell into a save; the delays have to change"
