#!/usr/bin/env bash
# Runs the whole test suite on the CPU, from a bare python3 (3.11 or newer); arguments go to pytest.
#
#   bash launch/test.sh                                    everything, in two processes
#   bash launch/test.sh tests/mixers -k causality          some of it
#   bash launch/test.sh -n 8                               eight processes; -n 0: one, in which breakpoints work
#   PYTHON=python3.13 bash launch/test.sh                  with another interpreter, in its own environment
#
# The first run makes .venv (launch/environment.sh) and needs a network; later runs do not.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$(bash "$root/launch/environment.sh")"
cd "$root"

export JAX_PLATFORMS=cpu
# libtpu comes with the test extra, to compile for TPUs from here. It shall not ask for the machine's TPU, nor take
# the lock that lets only one process use it.
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
# The test processes are the parallelism: thread pools inside each would only compete with them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

processes=(-n 2)
for argument in "$@"; do
  case "$argument" in
    -n | -n[0-9]* | -nauto | -nlogical | --numprocesses | --numprocesses=*) processes=() ;;
  esac
done
# Written so that an empty array is no error in bash before 4.4.
exec "$python" -m pytest ${processes[@]+"${processes[@]}"} "$@"
