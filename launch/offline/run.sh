#!/usr/bin/env bash
# Runs a command on a machine without a network. `launch/offline/run.sh --help` tells how.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
  cat <<'TEXT'
Usage: launch/offline/run.sh [OPTION...] COMMAND...

Installs the wheels that launch/offline/wheels.sh collected into a folder of their own, unless that
is done, and runs COMMAND in the repository with that folder on Python's path. The machine's own
packages stay as they are.

Options:
  --dry-run         print what would be done, do nothing
  --help            this

Environment:
  PATCHWAVE_WHEELS  the folder of the wheels (default: .whl in the repository)
  PATCHWAVE_SITE    where they are installed (default: /tmp/patchwave-site)

  launch/offline/run.sh python3 -m patchwave_jax.train --config=configs/demo.py --workdir=runs/demo
TEXT
}

die() {
  echo "run.sh: $*" >&2
  exit 2
}

dry=''
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --help | -h)
      usage
      exit
      ;;
    -*) die "unknown argument $1; see --help" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "the command is missing"

wheels=${PATCHWAVE_WHEELS:-$root/.whl}
site=${PATCHWAVE_SITE:-/tmp/patchwave-site}
install=(python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade)
if [[ -n $dry ]]; then
  echo "+ ${install[*]} --target=$site/WHEELS $wheels/*.whl"
  printf '+ PYTHONPATH=%s' "$root:$site/WHEELS"
  printf ' %q' "$@"
  printf '\n'
  exit
fi

shopt -s nullglob
files=("$wheels"/*.whl)
((${#files[@]})) || die "no wheels in $wheels; launch/offline/wheels.sh collects them"
# Each set of wheels has a folder, which appears once it is complete: several runs may start at once.
key=$(sha256sum "${files[@]}" | cut -d' ' -f1 | sha256sum | cut -c1-12)
if [[ ! -d $site/$key ]]; then
  mkdir -p "$site"
  new=$(mktemp -d "$site/new.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  "${install[@]}" --target="$new" "${files[@]}"
  chmod 755 "$new"
  mv -T "$new" "$site/$key" 2>/dev/null || [[ -d $site/$key ]] || die "can't write $site/$key"
  rm -rf "$new"
  trap - EXIT
fi

export PYTHONPATH=$root:$site/$key${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 # a command that is stopped at a time limit leaves its whole log
export MPLBACKEND=Agg # no display
cd "$root"
exec "$@"
