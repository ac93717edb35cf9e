# Sourced by the other scripts: makes .venv, installs the pinned requirements and the project (editable), and sets
# $python. Takes the name of a requirements file; a second run with unchanged files takes no time.
#   source scripts/setup.sh requirements.txt

requirements=${1:?usage: source scripts/setup.sh REQUIREMENTS_FILE}
venv="$PWD/.venv"
python="$venv/bin/python"
base_python=${PYTHON:-python3}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

command -v "$base_python" >/dev/null ||
  fail "no $base_python found. Install Python 3.10 or newer (Debian, Ubuntu: apt-get install python3 python3-venv)."
"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$base_python" --version) is too old. Install Python 3.10 or newer, or name one: PYTHON=python3.12 bash $0"
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null ||
  fail "no C++ compiler found. Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++)."

if [ ! -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
  echo "making .venv with $("$base_python" --version)"
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python cannot make environments here. Install its venv package (Debian, Ubuntu: apt-get install python3-venv)."
  "$base_python" -m venv --clear "$venv"
fi

# The stamp holds a hash of all that decides what is in .venv, and where it lies (an environment cannot be moved).
stamp=$({ printf '%s\n' "$requirements" "$venv"; cat requirements*.txt pyproject.toml; } | sha256sum | cut -d' ' -f1)
stamps="$venv/.rpe_tvm-stamps"
if ! grep -qsx "$stamp" "$stamps"; then
  echo "installing $requirements (the first time this takes a few minutes)"
  "$python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  printf '%s\n' "$stamp" >>"$stamps"
fi
unset requirements base_python compiler stamp stamps
