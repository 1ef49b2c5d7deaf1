#!/usr/bin/env bash
# A run on a Google Cloud TPU slice, asked for by a queued resource.
#
#   launch/tpu_pod.sh create --name=NAME --zone=ZONE --accelerator=v5p-256 [--spot]      ask for the slice, and wait for it
#   launch/tpu_pod.sh run    --name=NAME --zone=ZONE --accelerator=v5p-256 --bucket=BUCKET -- ivr_jax.train --config=…
#   launch/tpu_pod.sh delete --name=NAME --zone=ZONE                                     give it back, and stop paying
#
#   --dry-run            print the commands, one a line, and run nothing
#   --project=PROJECT    the Cloud project (default: the one of your gcloud)
#   --runtime=VERSION    image of the hosts (default: by the accelerator)
#   --folder=PATH        where the bucket is mounted on every host (default: /mnt/runs); --workdir goes below it
#
# What happens: `create` files the request and waits until the slice is ACTIVE. `run` copies the last commit of this
# checkout to every host, installs it there, mounts the bucket and starts the same command on all of them; they find each other
# (--distributed). A slice that is taken away (--spot) gets SIGTERM: the run saves, and `create` and `run` again go on.
# v5p-256 are 128 chips: the number counts cores (v5p, v4), or chips (v5litepod, v6e).
# Untested: no TPU could be rented; the commands are checked by --dry-run alone.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $* See launch/tpu_pod.sh --help." >&2; exit 2; }

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/tpu_flags.sh
source "$here/tpu_flags.sh"

action="" dry="" name="" zone="" accelerator="" project="" runtime="" bucket="" folder=/mnt/runs spot=() command=()
while (($#)); do
  case "$1" in
    create | run | delete) action="$1" ;;
    --dry-run) dry=yes ;;
    --spot) spot=(--spot) ;;
    --name=?*) name="${1#*=}" ;;
    --zone=?*) zone="${1#*=}" ;;
    --accelerator=?*) accelerator="${1#*=}" ;;
    --project=?*) project="${1#*=}" ;;
    --runtime=?*) runtime="${1#*=}" ;;
    --bucket=?*) bucket="${1#*=}" ;;
    --folder=/?*) folder="${1#*=}" ;;
    -h | --help) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) fail "unknown argument '$1'." ;;
  esac
  shift
done
[[ -n "$action" ]] || fail "say what to do: create, run or delete."
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are needed."
[[ -z "$accelerator" || "$accelerator" =~ ^(v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]] ||
  fail "--accelerator=$accelerator is no TPU slice known here: v4-N, v5p-N, v5litepod-N or v6e-N, as v5p-256."
where=("--zone=$zone" ${project:+"--project=$project"})

# Runs a command, or prints it so that it can be pasted.
run() {
  if [[ -n "$dry" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

create() {
  [[ -n "$accelerator" ]] || fail "create needs --accelerator."
  if [[ -z "$runtime" ]]; then
    case "$accelerator" in
      v5p*) runtime=v2-alpha-tpuv5 ;;
      v6e*) runtime=v2-alpha-tpuv6e ;;
      v5litepod*) runtime=v2-alpha-tpuv5-lite ;;
      *) fail "name the hosts' image with --runtime for $accelerator." ;;
    esac
  fi
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}
  [[ -z "$dry" ]] || return 0
  local state=""
  until [[ "$state" == ACTIVE ]]; do
    state="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')"
    echo "$(date +%T) $name is $state"
    case "$state" in
      FAILED | SUSPENDED) fail "the request ended as $state; delete it, and try another zone or --spot." ;;
      ACTIVE) ;;
      *) sleep 30 ;;
    esac
  done
}

start() {
  [[ -n "$accelerator" && -n "$bucket" ]] || fail "run needs --accelerator and --bucket."
  ((${#command[@]})) || fail "say what to run after --, as: -- ivr_jax.train --config=configs/emu35_sft.py."
  local on=(--worker=all "${where[@]}") archive="${TMPDIR:-/tmp}/$name.tar.gz" words prepare start
  words="$(printf '%q ' "${command[@]}")"
  prepare="set -e; mkdir -p ivr_jax; tar -xzf ivr_jax.tar.gz -C ivr_jax; cd ivr_jax"
  # Hosts' images bring an older Python; Ubuntu has the package.
  prepare+="; command -v python3.11 > /dev/null || { sudo apt-get -q update; sudo apt-get -qy install python3.11-venv; }"
  prepare+="; python3.11 -m venv .venv"
  prepare+="; .venv/bin/pip install --quiet --constraint launch/constraints.txt '.[tpu]'; sudo mkdir -p $(printf %q "$folder")"
  prepare+="; mountpoint -q $(printf %q "$folder") || sudo gcsfuse -o allow_other --implicit-dirs"
  prepare+=" $(printf %q "$bucket") $(printf %q "$folder")"
  start="cd ivr_jax; export LIBTPU_INIT_ARGS='$(libtpu_flags "$accelerator")'"
  start+="; exec .venv/bin/python -m ${words}--distributed"
  run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:ivr_jax.tar.gz" "${on[@]}"
  run gcloud compute tpus tpu-vm ssh "$name" "${on[@]}" --command="$prepare"
  run gcloud compute tpus tpu-vm ssh "$name" "${on[@]}" --command="$start"
}

case "$action" in
  create) create ;;
  run) start ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac
