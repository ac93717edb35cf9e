#!/usr/bin/env bash
# Installs Debian packages where that is possible, and otherwise says what is missing. Never fails: tests that need a
# missing one are skipped.
#   bash scripts/debian_packages.sh [PACKAGE...]    without packages: those of the tests
set -u

packages=("$@")
if [ ${#packages[@]} -eq 0 ]; then
  # cross compilers and the emulator for ARM; the linker and the disassembler for AMD GPUs; what builds a bundle's hosts
  packages=(g++-aarch64-linux-gnu g++-arm-linux-gnueabihf qemu-user-static lld-22 llvm-22 cmake)
fi

missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

log=$(mktemp)
trap 'rm -f "$log"' EXIT
give_up() {
  printf 'not installed: %s (%s); tests that need them are skipped\n' "${missing[*]}" "$1"
  exit 0
}
command -v apt-get >/dev/null || give_up "no apt-get here"
[ "$(id -u)" -eq 0 ] || give_up "only root can: apt-get install ${missing[*]}"
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install() {
  apt-get install --yes --no-install-recommends "$@" >>"$log" 2>&1
}
install "${missing[@]}" && exit 0
apt-get update >>"$log" 2>&1
install "${missing[@]}" && exit 0
# one that this release does not have keeps the others from being installed
absent=()
for package in "${missing[@]}"; do
  install "$package" || absent+=("$package")
done
missing=("${absent[@]}")
[ ${#missing[@]} -eq 0 ] || give_up "apt-get failed: $(tail -n 1 "$log")"
