#!/usr/bin/env bash
# From a bare python3 (3.11 or newer) to a trained language model, on two CPU cores in under ten minutes.
#
#   bash launch/quickstart.sh              installs into .venv, trains on the source text of Python's standard
#                                          library, evaluates, draws the loss curve, samples
#   bash launch/quickstart.sh --short      the same path with a few steps, to see that everything works
#   WORKDIR=/tmp/try bash launch/quickstart.sh       another folder for the run (default: runs/quickstart)
#
# A run that was interrupted goes on where it stopped when the command is given again.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
workdir="${WORKDIR:-$root/runs/quickstart}"
settings=()
case "${1:-}" in
  "") ;;
  --short)
    workdir="${WORKDIR:-$root/runs/quickstart-short}"
    settings=(
      --gin_param "STEPS = 30" --gin_param "WARMUP_STEPS = 5" --gin_param "DECAY_STEPS = 10"
      --gin_param "train.log_every = 10" --gin_param "train.evaluation_batches = 4"
    )
    rm -rf "$workdir"
    ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac

python="$(bash "$root/launch/environment.sh")"
cd "$root"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TPU_SKIP_MDS_QUERY=1

step() { printf '\n== %s\n' "$*"; }

step "Training a small hybrid of linear and local attention on the source text of Python's standard library"
"$python" launch/train.py --gin_file configs/runs/quickstart.gin --workdir "$workdir" ${settings[@]+"${settings[@]}"}

step "Evaluating it: bits per byte over the whole test split"
"$python" launch/evaluate.py --workdir "$workdir" --split test

step "Sampling from it"
"$python" launch/generate.py --workdir "$workdir" --prompt '    def __init__(self' \
  --max_new_tokens 300 --temperature 0.8 --top_p 0.9 --seed 1

step "Done. The loss curve is $workdir/loss.png"
cat <<NEXT
What to try next:
  $python launch/generate.py --workdir $workdir --prompt 'class '
  $python launch/train.py --gin_file configs/runs/quickstart.gin --workdir runs/attention \\
      --gin_param 'Decoder.pattern = ("linear_attention", "attention")' --gin_param 'Decoder.mixers = None'
  $python launch/train.py --help
Run files for WikiText-2 and Tiny Shakespeare are in configs/runs/; README.md says how to use your own text.
NEXT
