#!/usr/bin/env bash
# From a fresh clone to a checked result on a long document: needs Python 3.10+ and a C++ compiler, nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh requirements.txt
"$python" scripts/quickstart.py "$@"
