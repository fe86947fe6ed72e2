#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster. `launch/slurm_gpu.sh --help` tells how.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/slurm_gpu.sh --name=NAME [OPTION...] -- FLAG...

Submits a job, unless one of that name is queued or runs. Each GPU gets a process. Five minutes
ahead of the time limit the run saves and queues itself again; a preempted job goes on likewise.

Options:
  --name=NAME       what the job is called
  --nodes=N         nodes (default 1)
  --gpus=N          GPUs of each node (default 4); 0 for a cluster without any
  --cpus=N          CPUs for each process (default 8)
  --time=LIMIT      time limit of one stretch (default 24:00:00)
  --account=NAME, --partition=NAME   as your cluster asks for
  --python=PATH     the Python that patchwave_jax is installed for (default python)
  --dry-run         print what would be done, do nothing
  --help            this

FLAGs are those of `python -m patchwave_jax.train`:
  launch/slurm_gpu.sh --name=pw --nodes=2 --account=my-account -- \
    --config=configs/ctx128k.py:dense --config.train.batch_size=8 --workdir=$HOME/runs/pw
TEXT
}

die() {
  echo "slurm_gpu.sh: $*" >&2
  exit 2
}

# In the job: Slurm runs a copy of this file.
if [[ ${1-} == --inside ]]; then
  python=$2
  shift 2
  again=''
  # The steps get SIGTERM from us here, and from Slurm itself where it preempts.
  trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  trap : TERM
  srun --kill-on-bad-exit=1 "$python" -m patchwave_jax.train "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # a trapped signal ends it early
  done
  wait "$step" && code=0 || code=$?
  if [[ -n $again && $code == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
fi

name='' nodes=1 gpus=4 cpus=8 limit=24:00:00 account='' partition='' python=python dry=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=*) limit=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --python=*) python=${1#*=} ;;
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
[[ -n $name ]] || die "--name is missing: what the job is to be called"
for number in "nodes=$nodes" "gpus=$gpus" "cpus=$cpus"; do
  [[ $number =~ ^[a-z]+=[0-9]+$ ]] || die "--$number is no number"
done
(($#)) || die "the flags of train are missing: -- --config=... --workdir=..."

flags=(--parsable "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$((gpus > 0 ? gpus : 1))"
  "--cpus-per-task=$cpus" "--time=$limit" "--output=$name-%j.log")
((gpus == 0)) || flags+=("--gpus-per-node=$gpus")
[[ -z $account ]] || flags+=("--account=$account")
[[ -z $partition ]] || flags+=("--partition=$partition")
command=(sbatch "${flags[@]}" "${BASH_SOURCE[0]}" --inside "$python" "$@")
if [[ -n $dry ]]; then
  printf '+'
  printf ' %q' "${command[@]}"
  printf '\n'
  exit
fi
queued=$(squeue --noheader --me "--name=$name" --format=%i)
if [[ -n $queued ]]; then
  echo "$name is there already: job $queued"
else
  "${command[@]}"
fi
