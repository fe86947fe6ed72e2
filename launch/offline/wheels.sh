#!/usr/bin/env bash
# Collects the wheels that launch/offline/run.sh installs. `launch/offline/wheels.sh --help` tells how.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
  cat <<'TEXT'
Usage: launch/offline/wheels.sh [OPTION...] [DIR]

Collects in DIR (default: .whl in the repository) wheels of the packages that
launch/offline/packages.txt names, at the versions of requirements.lock, for CPython 3.12 on x86-64
Linux. Needs a network and any Python 3 with pip. Other versions of these packages in DIR are
removed, other files are left alone.

Options:
  --dry-run         print what would be done, do nothing
  --help            this
TEXT
}

die() {
  echo "wheels.sh: $*" >&2
  exit 2
}

dir='' dry=''
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --help | -h)
      usage
      exit
      ;;
    -*) die "unknown argument $1; see --help" ;;
    *)
      [[ -z $dir ]] || die "one folder at most, not also $1"
      dir=$1
      ;;
  esac
  shift
done
dir=${dir:-$root/.whl}

binary=() source=()
while read -r name; do
  # A name's separators and case differ between sources: dm-tree is also dm_tree.
  pin=$(grep -i -m1 -E "^${name//[-_.]/[-_.]}==" "$root/requirements.lock") ||
    die "requirements.lock doesn't pin $name"
  case $name in
    promise) source+=("$pin") ;; # published without a wheel; pure Python
    *) binary+=("$pin") ;;
  esac
done <"$root/launch/offline/packages.txt"

target=(--only-binary=:all: --python-version=3.12 --implementation=cp --abi=cp312 --abi=abi3 --abi=none)
for ((glibc = 39; glibc >= 17; glibc--)); do # pip takes exactly the tags that it is given
  target+=("--platform=manylinux_2_${glibc}_x86_64")
done
target+=(--platform=manylinux2014_x86_64 --platform=manylinux2010_x86_64 --platform=manylinux1_x86_64)

act() {
  if [[ -n $dry ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

new=NEW
if [[ -z $dry ]]; then
  mkdir -p "$dir"
  new=$(mktemp -d "$dir/new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
fi
act python3 -m pip download --quiet --no-deps "${target[@]}" "--dest=$new" "${binary[@]}"
act python3 -m pip wheel --quiet --no-deps "--wheel-dir=$new" "${source[@]}"
[[ -z $dry ]] || exit 0

shopt -s nocaseglob nullglob
for wheel in "$new"/*.whl; do
  file=${wheel##*/}
  rm -f "$dir/${file%%-*}"-*.whl
  mv "$wheel" "$dir/"
done
wheels=("$dir"/*.whl)
echo "${#wheels[@]} wheels, $(du -sh "$dir" | cut -f1), in $dir"
