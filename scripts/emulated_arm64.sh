#!/usr/bin/env bash
# Makes an arm64 Debian with Python, NumPy and apache-tvm-ffi in a directory, cross-compiles operators, and checks them
# there against the float64 reference, under emulation. Takes minutes, needs root, apt-get and PyPI; not part of the tests.
#   bash scripts/emulated_arm64.sh ROOT [TARGET...]      targets: cortex-a72 cortex-a76 if none is named
# A root that is there already is used as it is. Times of emulation say nothing about a board.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=${1:?usage: bash scripts/emulated_arm64.sh ROOT [TARGET...]}
shift
[ $# -gt 0 ] || set -- cortex-a72 cortex-a76
python=${PYTHON:-.venv/bin/python}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
release=bookworm
python_version=3.11 # of that release

bash scripts/debian_packages.sh debootstrap qemu-user-static g++-aarch64-linux-gnu
if [ ! -x "$root/usr/bin/python3" ]; then
  # without the kernel's binfmt_misc, debootstrap could not run what it unpacks
  debootstrap --arch=arm64 --variant=minbase --include=python3,libgomp1 "$release" "$root" "$mirror"
fi
packages="$root/usr/local/lib/python$python_version/dist-packages"
if [ ! -d "$packages/numpy" ] || [ ! -d "$packages/tvm_ffi" ]; then
  platforms=()
  for glibc in 2_17 2_24 2_27 2_28 2_34; do platforms+=(--platform "manylinux_${glibc}_aarch64"); done
  "$python" -m pip install --quiet --target "$packages" --only-binary :all: "${platforms[@]}" \
    --python-version "$python_version" --implementation cp numpy apache-tvm-ffi==0.1.14.post1
fi

here="$root/opt/rpe_tvm"
rm -rf "$here"
mkdir -p "$here/operators"
cp -rL rpe_tvm scripts/emulated_arm64.py "$here"
directories=()
for target in "$@"; do
  for size in "16 40" "5 7"; do
    read -r features head_dim <<<"$size"
    name="$target-m$features-d$head_dim"
    "$python" -m rpe_tvm compile --target "$target" --features "$features" --head-dim "$head_dim" \
      --lengths 64,500,1300 --out "$here/operators/$name"
    directories+=("operators/$name")
  done
done
for directory in "${directories[@]}"; do
  cpu=${directory#operators/}
  cpu=${cpu%%-m*}
  # an instruction that the target lacks ends the program
  echo "== $cpu"
  chroot "$root" /usr/bin/env QEMU_CPU="${cpu/aarch64/max}" PYTHONPATH=/opt/rpe_tvm OMP_NUM_THREADS=2 \
    /bin/sh -c "cd /opt/rpe_tvm && exec python3 emulated_arm64.py $directory"
done
