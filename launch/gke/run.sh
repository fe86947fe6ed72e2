#!/usr/bin/env bash
# Trains on TPUs of a Google Kubernetes Engine cluster. `launch/gke/run.sh --help` tells how.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gke/run.sh COMMAND --project=ID --zone=ZONE --cluster=NAME --name=NAME [OPTION...] [-- FLAG...]

Commands, each of which may be repeated:
  build     build the image of this checkout for TPUs and push it
  apply     start the JobSet, unless it is there
  log       follow the log of worker 0
  status    the JobSet and its pods
  delete    end it; its pods save first

Options:
  --image=IMAGE      such as us-docker.pkg.dev/my-project/my-repo/patchwave:1 (build, apply)
  --type=TYPE        v4, v5e, v5p or v6e (default v5e)
  --topology=SHAPE   of the slice (default 4x4)
  --spot             on spot nodes
  --restarts=N       how often to start over after a failure or a preemption (default 100)
  --account=NAME     Kubernetes service account that may use the bucket (default default)
  --dry-run          print what would be done, do nothing
  --help             this

FLAGs are those of `python -m patchwave_jax.train`; the run outlives its pods in a bucket. The
cluster needs a node pool of that slice, and JobSet (https://jobset.sigs.k8s.io/docs/installation):
  launch/gke/run.sh apply --project=my-project --zone=us-west4-a --cluster=my-cluster --name=pw \
    --image=us-docker.pkg.dev/my-project/my-repo/patchwave:1 -- \
    --config=configs/ctx128k.py:dense --config.train.batch_size=16 \
    --config.data.data_dir=gs://my-bucket/data --workdir=gs://my-bucket/runs/pw
TEXT
}

die() {
  echo "run.sh: $*" >&2
  exit 2
}

command='' project='' zone='' cluster='' name='' image='' type=v5e topology=4x4 spot='' restarts=100
account=default dry=''
while (($#)); do
  case $1 in
    build | apply | log | status | delete)
      [[ -z $command ]] || die "two commands: $command and $1"
      command=$1
      ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --spot) spot=yes ;;
    --restarts=*) restarts=${1#*=} ;;
    --account=*) account=${1#*=} ;;
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
[[ -n $zone ]] || die "--zone is missing: where the cluster is, such as us-west4-a"
[[ -n $cluster ]] || die "--cluster is missing: the name of your cluster"
[[ -n $name ]] || die "--name is missing: what the JobSet is to be called"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name must be of a-z, 0-9 and -"
[[ $account =~ ^[a-z0-9]([a-z0-9.-]*)$ ]] || die "--account=$account is no service account's name"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts is no number"
if [[ $command == build || $command == apply ]]; then
  [[ -n $image ]] || die "--image is missing: where the image is kept"
  [[ $image =~ ^[A-Za-z0-9][A-Za-z0-9./:_@-]*$ ]] || die "--image=$image is no image's name"
fi
[[ $command != apply ]] || (($#)) || die "the flags of train are missing: -- --config=... --workdir=..."
case $type in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *) die "--type=$type is unknown; it is v4, v5e, v5p or v6e" ;;
esac
[[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || die "--topology=$topology must be like 4x4 or 2x2x4"
total=$((${topology//x/*}))
((total >= 4)) || die "--topology=$topology is less than one host's four chips"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
context="gke_${project}_${zone}_${cluster}"

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

kube() { run kubectl "--context=$context" "$@"; }

# The contexts of kubectl are made by gcloud, once.
connect() {
  if [[ -n $dry ]] || ! kubectl config get-contexts "$context" >/dev/null 2>&1; then
    run gcloud container clusters get-credentials "$cluster" "--project=$project" "--zone=$zone"
  fi
}

# The arguments as a list of JSON strings, which YAML is too.
quoted() {
  local argument list=''
  for argument in "$@"; do
    [[ $argument != *[[:cntrl:]]* ]] || die "a flag of train holds a control character"
    argument=${argument//\\/\\\\}
    list+=", \"${argument//\"/\\\"}\""
  done
  printf '[%s]' "${list:2}"
}

manifest() {
  local text args
  args=$(quoted "$@")
  text=$(<"$here/launch/gke/jobset.yaml")
  text=${text//@NAME@/"$name"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@HOSTS@/"$((total / 4))"}
  text=${text//@CHIPS@/4}
  text=${text//@ACCOUNT@/"$account"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@SPOT@/"${spot:+cloud.google.com/gke-spot: \"true\"}"}
  text=${text//@IMAGE@/"$image"}
  printf '%s\n' "${text//@ARGS@/"$args"}"
}

build() {
  run docker build "--file=$here/launch/Dockerfile.tpu" "--tag=$image" "$here"
  run docker push "$image"
}

apply() {
  connect
  if [[ -n $dry ]]; then
    kube apply --filename=-
    manifest "$@"
  elif kube get jobset "$name" >/dev/null 2>&1; then
    echo "$name is there already; delete it to start another" >&2
  else
    manifest "$@" | kube apply --filename=-
  fi
}

log() {
  connect
  kube logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

status() {
  connect
  kube get jobset "$name"
  kube get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name"
}

delete() {
  connect
  kube delete jobset "$name" --ignore-not-found
}

"$command" "$@"
