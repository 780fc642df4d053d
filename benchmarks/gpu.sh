#!/usr/bin/env bash
# GPU tests, then benchmarks, with the python and torch that are there: nothing is downloaded or installed.
#   bash benchmarks/gpu.sh [output folder]        PYTHON=<python> chooses the interpreter
# Runs everything even where something fails, and lists what failed at the end; the exit status is the number of failures.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
output=${1:-runs/gpu}
failed=()
mkdir -p "$output"
export PYTHONPATH=$PWD

step() {
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$output/$name.log"
  local status=${PIPESTATUS[0]}
  # pytest's 5: there is nothing to run in that folder
  if [ "$status" -ne 0 ] && [ "$status" -ne 5 ]; then failed+=("$name (exit $status)"); fi
}

step device nvidia-smi
step build "$python" setup.py -q build_ext --inplace
step backends "$python" -c "import lmfusion_kernels as lk; print(lk.backends())"
step tests "$python" -m pytest tests/gpu -q
step benchmarks "$python" -m pytest benchmarks --benchmark-only -q --benchmark-json "$output/benchmarks.json"

if [ ${#failed[@]} -eq 0 ]; then
  echo "== everything passed; logs in $output"
else
  echo "== failed: ${failed[*]}; logs in $output"
fi
exit ${#failed[@]}
