#!/usr/bin/env bash
# Sets up .venv and runs all checks and tests. Arguments go to pytest: bash scripts/test.sh -k buckets
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh requirements-test.txt

step() {
  printf '\n== %s\n' "$1"
}

step "ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .
step "mypy"
"$python" -m mypy
step "pytest (GPU tests are skipped: this version has no GPU code)"
"$python" -m pytest -q "$@"
