#!/usr/bin/env bash
# Starts TVM's RPC server on an emulated arm64 board, in the foreground: to try scripts/tune_arm.py where no board is.
#   bash scripts/emulated_board.sh ROOT HOST:PORT KEY     root, tracker, key
# ROOT is made by scripts/emulated_arm64.sh. Needs root's rights; the first time, apache-tvm for aarch64 is installed there.
# Its times mean nothing: tune_arm.py finds out that it is emulated, and its logs are refused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash scripts/emulated_board.sh ROOT HOST:PORT KEY"
root=${1:?$usage}
tracker=${2:?$usage}
key=${3:?$usage}
python=${PYTHON:-.venv/bin/python}
python_version=3.11 # of the root's Debian

if [ ! -x "$root/usr/bin/python3" ]; then
  echo "error: $root holds no arm64 system. Make one: bash scripts/emulated_arm64.sh $root" >&2
  exit 1
fi
packages="$root/usr/local/lib/python$python_version/dist-packages"
if [ ! -d "$packages/tvm" ]; then
  platforms=()
  for glibc in 2_17 2_24 2_27 2_28 2_34; do platforms+=(--platform "manylinux_${glibc}_aarch64"); done
  grep -E '^(apache-tvm|apache-tvm-ffi|ml_dtypes|psutil|typing_extensions|cloudpickle|tornado)==' requirements.txt |
    "$python" -m pip install --quiet --target "$packages" --no-deps --only-binary :all: "${platforms[@]}" \
      --python-version "$python_version" --implementation cp --requirement /dev/stdin
fi
# /proc is mounted for the server alone, and gone with it
exec unshare --mount bash -c 'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/bin/env TVM_USE_RUNTIME_LIB=1 \
  python3 -m tvm.exec.rpc_server --tracker "$1" --key "$2" --host 127.0.0.1' "$root" "$tracker" "$key"
