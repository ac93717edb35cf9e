#!/usr/bin/env bash
# Sets up .venv and runs all checks and tests. Arguments go to pytest: bash scripts/test.sh -k buckets
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Only tests need them: they are installed while other things are.
packages=$(mktemp)
bash scripts/debian_packages.sh >"$packages" 2>&1 &
installing=$!
trap 'wait; rm -f "$packages"' EXIT
source scripts/setup.sh requirements-test.txt

step() {
  printf '\n== %s\n' "$1"
}

# Processes of the tests share the cores: threads of OpenMP that have nothing to do shall sleep, not spin.
export OMP_WAIT_POLICY=passive
# Some images set it, and every process that tests start would compile our modules anew.
unset PYTHONDONTWRITEBYTECODE

step "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
step "mypy"
"$python" -m mypy
step "Debian packages"
failed=0
wait "$installing" || failed=$?
cat "$packages"
test "$failed" = 0
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  step "pytest (with GPU tests)"
  workers=0 # one process: tests on a GPU share it
else
  step "pytest (GPU tests are skipped: torch finds no GPU; device code is compiled and checked, not run)"
  workers=$(nproc)
  [ "$workers" -le 4 ] || workers=4
fi
"$python" -m pytest -q --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
