"""Measures ops by their definition and the clock, the trainer by its bare step, and decoding.

Rows are JSON lines. The manual: python launch/benchmark.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import command_line

DESCRIPTION = """Measures on this machine and prints JSON lines, to be quoted as medians and ratios.

  ops       each op, implementation and case: errors against the float64 definition, then the time
            of a forward pass and of forward and backward. A row whose errors are too large says so
            and has no times.
  trainer   the time of a whole training step (data, logging, checkpoints) over that of the bare
            jitted step on one batch, in turns.
  decode    milliseconds a token and bytes of state, by position."""

EPILOG = f"""{command_line.EXIT_CODES}

examples:
  python launch/benchmark.py ops --op linear_attention --case cpu
  python launch/benchmark.py trainer --gin_file configs/runs/quickstart.gin
  python launch/benchmark.py decode --tokens 2000"""

OPS = (
  "linear_attention", "delta_rule", "short_convolution", "long_convolution", "attention",
  "grassmann",
)  # fmt: skip
# A result may be off by this many units in the last place of its dtype, as a fraction of its RMS:
# what the sums of a few thousand products leave. Beyond it something is wrong, not rounded.
ALLOWED_UNITS = 64
WINDOW = 10  # steps that are timed together


def options() -> argparse.ArgumentParser:
  """The options, with the manual."""
  parser = command_line.parser(DESCRIPTION, EPILOG)
  kinds = parser.add_subparsers(dest="kind", required=True, metavar="ops|trainer|decode")
  ops = kinds.add_parser("ops", help="errors and times of ops")
  ops.add_argument("--op", nargs="+", choices=OPS, default=OPS)
  ops.add_argument(
    "--case", nargs="+", default=["cpu"], help="names in pallas_kernels/<op>/cases.py"
  )
  ops.add_argument(
    "--length", type=int, nargs="+", metavar="T", help="in place of that of the case"
  )
  ops.add_argument("--implementation", nargs="+", default=["xla"], help="xla, reference, tpu")
  ops.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  ops.add_argument("--repeats", type=int, default=7, help="timed runs; default %(default)s")
  trainer = kinds.add_parser("trainer", help="the trainer over its bare step")
  trainer.add_argument("--gin_file", action="append", required=True)
  trainer.add_argument("--gin_param", action="append", default=[])
  trainer.add_argument("--rounds", type=int, default=5, help="turns of each; default %(default)s")
  trainer.add_argument("--steps", type=int, default=40, help="steps a turn; default %(default)s")
  decode = kinds.add_parser("decode", help="time a token, by position")
  decode.add_argument("--tokens", type=int, default=2000)
  decode.add_argument("--dim", type=int, default=256)
  decode.add_argument("--depth", type=int, default=6)
  return parser


def benchmark(arguments: argparse.Namespace) -> int:
  """Prints the rows; returns the exit code, 1 where a result is wrong."""
  rows = {"ops": _ops, "trainer": _trainer, "decode": _decode}[arguments.kind](arguments)
  wrong = False
  for row in rows:
    wrong |= row.get("gate") == "failed"
    print(json.dumps({"benchmark": arguments.kind, **row, **_here()}), flush=True)
  return int(wrong)


@functools.cache
def _here() -> dict[str, str]:
  import jax

  command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
  revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
  device = jax.devices()[0]
  chip = (
    platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
  )
  return {
    "chip": chip,
    "jax": jax.__version__,
    "revision": revision or "unknown",
    "times": "measured",
  }


def _ops(arguments: argparse.Namespace) -> Iterator[dict]:
  for op in arguments.op:
    cases = importlib.import_module(f"pallas_kernels.{op}.cases")
    cases = {case.name: case for case in (*cases.BENCHMARKS, *cases.CASES)}
    for name in arguments.case:
      if name not in cases:
        raise ValueError(f"--case {name}: {op} has no such case; it has {', '.join(cases)}")
      for length in arguments.length or [cases[name].length]:
        case = dataclasses.replace(cases[name], length=length)
        for implementation in arguments.implementation:
          yield _op_row(op, case, implementation, arguments.dtype, arguments.repeats)


def _op_row(op: str, case, implementation: str, dtype: str, repeats: int) -> dict:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxmix.compile_ahead.cases import op_function

  # From the first token on, as most runs begin.
  arrays = {name: x for name, x in case.inputs().items() if name != "state"}
  if op == "linear_attention" and "g" not in arrays:
    for name in ("q", "k"):  # a feature map, without which nothing is summed up
      arrays[name] = np.where(arrays[name] > 0, arrays[name] + 1, np.exp(arrays[name]))
  arrays = {
    name: jnp.asarray(x, "float32" if name in case.float32 else dtype) for name, x in arrays.items()
  }
  function = functools.partial(op_function(op), **case.options())

  def forward(implementation, arrays):
    ids = case.segment_ids()
    if ids is not None:
      batch, length = next(iter(arrays.values())).shape[:2]  # of the rows
      ids = jnp.asarray(ids[:batch, :length])
    return function(**arrays, segment_ids=ids, implementation=implementation)[0]

  whole = jax.eval_shape(functools.partial(forward, "xla"), arrays).shape
  cotangent = jax.random.normal(jax.random.key(1), whole)

  def backward(implementation, arrays):
    def loss(arrays):
      y = forward(implementation, arrays)
      return jnp.sum(y.astype(cotangent.dtype) * cotangent[: y.shape[0], : y.shape[1]])

    return jax.grad(loss)(arrays)

  # The definition is walked through token by token in float64, so it sees the beginning only.
  rows = (case.batch, case.length)
  start = {name: x[:1, :256] if x.shape[:2] == rows else x for name, x in arrays.items()}
  found = [run(implementation, start) for run in (forward, backward)]
  with jax.enable_x64(True):
    start = {name: x.astype(jnp.float64) for name, x in start.items()}
    exact = [run("reference", start) for run in (forward, backward)]
    value, gradient = (_error(*pair) for pair in zip(found, exact, strict=True))
  good = max(value, gradient) <= ALLOWED_UNITS * float(jnp.finfo(dtype).eps)
  row = {
    "op": op,
    "implementation": implementation,
    "case": case.name,
    "shapes": {name: list(x.shape) for name, x in arrays.items()},
    "dtype": dtype,
    "value_error": value,
    "gradient_error": gradient,
    "gate": "passed" if good else "failed",
  }
  if good:
    for name, timed in (("forward", forward), ("forward_backward", backward)):
      run = jax.jit(functools.partial(timed, implementation))
      row |= _timed(name, lambda run=run: jax.block_until_ready(run(arrays)), repeats)
  return row


def _error(found, exact) -> float:
  """Largest relative RMS error over the leaves."""
  import jax
  import numpy as np

  leaves = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
  pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in leaves]
  return max(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for a, b in pairs)


def _timed(name: str, run: Callable[[], object], repeats: int) -> dict[str, float]:
  started = time.perf_counter()
  run()
  compiled = time.perf_counter() - started
  seconds = []
  for _ in range(repeats):
    started = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - started)
  seconds.sort()
  return {
    f"{name}_ms": seconds[len(seconds) // 2] * 1e3,
    f"{name}_ms_spread": (seconds[-1] - seconds[0]) * 1e3,
    f"{name}_compile_s": compiled,
  }


def _trainer(arguments: argparse.Namespace) -> Iterator[dict]:
  """Turns of bare steps and of the trainer; each turn of the trainer goes on with one run."""
  import jax
  import numpy as np

  from jaxmix import configuration, training
  from jaxmix.sharding import put_batch
  from jaxmix.training.run import SUPPLIED, abstract_run

  run = configuration.load(
    arguments.gin_file, arguments.gin_param, root=training.train, supplied=SUPPLIED
  )
  data, mesh, batch_size = run.value("data"), run.value("mesh")(), run.value("batch_size")
  with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
    program, _ = abstract_run(run, mesh, outline=data.outline)
    state = program.init(0)
    batch = put_batch(next(data.batches("train", batch_size=batch_size, seed=0)), mesh)
    state, results = program.update(state, batch)
    jax.block_until_ready(results)
    bare, whole = [], []
    for turn in range(1, arguments.rounds + 1):
      for _ in range(arguments.steps // WINDOW):
        started = time.perf_counter()
        for _ in range(WINDOW):
          state, results = program.update(state, batch)
        jax.block_until_ready(results)
        bare.append((time.perf_counter() - started) / WINDOW)
      whole += _trainer_turn(run, folder, turn * (arguments.steps + WINDOW), arguments.steps)
  yield {
    "run": arguments.gin_file[-1],
    "windows_of_steps": WINDOW,
    "bare_step_ms": float(np.median(bare) * 1e3),
    "trainer_step_ms": float(np.median(whole) * 1e3),
    "ratio_of_medians": float(np.median(whole) / np.median(bare)),
    "ratio_of_fastest": min(whole) / min(bare),
    "windows": len(whole),
  }


def _trainer_turn(run, folder: str, steps: int, counted: int) -> list[float]:
  """Trains on to `steps` with a checkpoint in the middle: seconds a step in each late window."""
  run.call(
    workdir=folder,
    config="",
    steps=steps,
    log_every=WINDOW,
    evaluate_every=0,
    evaluation_batches=1,
    checkpoint_every=max(WINDOW, counted // 2 // WINDOW * WINDOW),
  )
  lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
  recent = [line for line in lines if line["split"] == "train" and line["step"] > steps - counted]
  return [line["step_seconds"] for line in recent]


def _decode(arguments: argparse.Namespace) -> Iterator[dict]:
  import jax
  import numpy as np
  from flax import nnx

  from jaxmix import inference
  from jaxmix.mixers import Attention, LinearAttention
  from jaxmix.models import Decoder

  attention = functools.partial(Attention, heads=4, max_length=arguments.tokens + 64)
  mixers = {"linear_attention": functools.partial(LinearAttention, heads=4), "attention": attention}
  for name in mixers:
    model = Decoder(
      257, arguments.dim, arguments.depth, pattern=(name,), mixers=mixers, rngs=nnx.Rngs(params=0)
    )
    graph, params = nnx.split(model)
    moments = [time.perf_counter()]
    steps = inference.generate(
      graph, nnx.to_pure_dict(params), [[1]], max_new_tokens=arguments.tokens, temperature=0.0
    )
    for _ in steps:
      moments.append(time.perf_counter())
    milliseconds = np.diff(moments)[2:] * 1e3  # two programs are compiled before
    tenths = [float(np.median(part)) for part in np.array_split(milliseconds, 10)]
    state = jax.eval_shape(lambda model=model: model.init_state(1))
    yield {
      "mixer": name,
      "tokens": arguments.tokens,
      "model": f"dim {arguments.dim}, depth {arguments.depth}",
      "ms_per_token_by_tenth": [round(x, 3) for x in tenths],
      "last_over_first": tenths[-1] / tenths[0],
      "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit code."""
  return command_line.exit_code(benchmark, options().parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
