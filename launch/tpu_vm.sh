#!/usr/bin/env bash
# Trains on a slice of Cloud TPUs. `launch/tpu_vm.sh --help` tells how.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_vm.sh COMMAND --project=ID --zone=ZONE --name=NAME [OPTION...] [-- FLAG...]

Commands, each of which may be repeated:
  create    ask for the slice and wait until it is there; one that was preempted is replaced
  install   copy this checkout to every worker and install it
  train     start training on every worker, unless it runs already
  log       follow the log of worker 0
  stop      have every worker save and stop
  up        all of it: create, install, train; again after each preemption, until training ends
  status    what became of the slice
  delete    give the slice back

Options:
  --type=TYPE      accelerator type (default v5litepod-16; v4-32, v5p-128, v6e-256 ...)
  --runtime=NAME   software version (default: the one for the type)
  --spot           cheaper, may be preempted
  --dry-run        print what would be done, do nothing
  --help           this

FLAGs are those of `python -m patchwave_jax.train`. The run outlives the slice in a bucket, and
every worker copies the built data from there to its disk, once:
  launch/tpu_vm.sh up --project=my-project --zone=us-west4-a --name=pw --spot -- \
    --config=configs/ctx128k.py:dense --config.train.batch_size=16 \
    --config.data.data_dir=gs://my-bucket/data --workdir=gs://my-bucket/runs/pw
TEXT
}

die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

command='' project='' zone='' name='' type=v5litepod-16 runtime='' spot='' dry=''
while (($#)); do
  case $1 in
    create | install | train | log | stop | up | status | delete)
      [[ -z $command ]] || die "two commands: $command and $1"
      command=$1
      ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=yes ;;
    --dry-run) dry=yes ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown argument $1; see --help" ;;
  esac
  shift
done
[[ -n $command ]] || die "a command is missing; see --help"
[[ -n $project ]] || die "--project is missing: the id of your Google Cloud project"
[[ -n $zone ]] || die "--zone is missing: where the slice is to be, such as us-west4-a"
[[ -n $name ]] || die "--name is missing: what the slice is to be called"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name must be of a-z, 0-9 and -"
if [[ $command == train || $command == up ]]; then
  (($#)) || die "the flags of train are missing: -- --config=... --workdir=..."
fi
if [[ -z $runtime ]]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--type=$type is unknown here; say its --runtime" ;;
  esac
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
place=("--project=$project" "--zone=$zone")

# Prints a command in a dry run, runs it otherwise.
run() {
  if [[ -n $dry ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpu() { run gcloud compute tpus "$@" "${place[@]}"; }

# Runs a script on all workers, or on one. It is text for a shell there.
on_workers() { tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    '--format=value(state.state)' 2>/dev/null || echo NONE
}

request() {
  local flags=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime")
  [[ -z $spot ]] || flags+=(--spot)
  tpu queued-resources create "$name" "${flags[@]}"
}

create() {
  if [[ -n $dry ]]; then
    request
    echo "# then wait until its state is ACTIVE"
    return
  fi
  local now before=''
  while now=$(state); [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || echo "$name: $now" >&2
    before=$now
    case $now in
      NONE) request || die "the slice was not granted; see above" ;;
      SUSPENDED | FAILED) tpu queued-resources delete "$name" --force --quiet ;;
    esac
    sleep "${TPU_VM_POLL_SECONDS:-30}"
  done
}

# A file that git does not know stays here, whatever it is.
install() {
  local archive=/tmp/patchwave_jax_$name.tar.gz
  run git -C "$here" archive --format=tar.gz "--output=$archive" HEAD || return
  tpu tpu-vm scp "$archive" "$name:patchwave_jax.tar.gz" --worker=all || return
  on_workers all 'set -eu
mkdir -p patchwave_jax && tar -xzf patchwave_jax.tar.gz -C patchwave_jax && cd patchwave_jax
test -x .venv/bin/python || { python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --python 3.12; }
~/.local/bin/uv pip install --quiet -e ".[tpu,gcs]" -c requirements.lock'
}

train() {
  local flags
  printf -v flags ' %q' "$@"
  # The exit code in train.exit tells `up` whether it is over; it is gone while training runs.
  on_workers all "set -eu
cd patchwave_jax
if test -s train.pid && kill -0 \"\$(cat train.pid)\" 2> /dev/null; then echo runs already; exit; fi
rm -f train.exit
nohup setsid bash -c '.venv/bin/python -m patchwave_jax.train \"\$@\"; echo \$? > train.exit' train$flags >> train.log 2>&1 < /dev/null &
echo \$! > train.pid"
}

stop() {
  # To the Python process: its shell has the exit code to write.
  on_workers all "cd patchwave_jax && test -s train.pid && pkill -TERM -P \"\$(cat train.pid)\" ||
echo does not run"
}

log() { on_workers 0 'tail -n 100 -F patchwave_jax/train.log'; }

up() {
  local code
  while create; do
    install && train "$@" || [[ $(state) != ACTIVE ]] || die "could not start training on $name"
    if [[ -n $dry ]]; then
      echo "# then look for the exit code in patchwave_jax/train.exit, and start over if preempted"
      return
    fi
    while [[ $(state) == ACTIVE ]]; do
      code=$(on_workers 0 'cat patchwave_jax/train.exit 2> /dev/null || true' 2>/dev/null || true)
      [[ -z $code ]] || return "$code"
      sleep "${TPU_VM_POLL_SECONDS:-30}"
    done
    echo "$name was preempted; asking for another" >&2
  done
}

status() { tpu queued-resources describe "$name"; }

delete() {
  if [[ -z $dry && $(state) == NONE ]]; then
    echo "$name is not there" >&2
  else
    tpu queued-resources delete "$name" --force --quiet
  fi
}

"$command" "$@"
