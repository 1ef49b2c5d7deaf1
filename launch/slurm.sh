#!/usr/bin/env bash
# A run on GPUs of a SLURM cluster: one task a node, each with all of its node's GPUs.
#
#   launch/slurm.sh --nodes=4 [--gpus=8] [--time=24:00:00] [--partition=NAME] -- ivr_jax.train --config=emu35_sft --workdir=…
#
#   --dry-run        print the command for the queue, and queue nothing
#   --name=NAME      of the job (default: ivr_jax)
#   --chain=1        queue it this many times, one after the other, for a run that is longer than --time
#   --image=IMAGE    run inside this container (pyxis: --container-image), with $PWD mounted; without, PYTHON runs
#
# PYTHON names the interpreter on the nodes (default: .venv/bin/python of this checkout, with '.[gpu]' installed). The
# work directory must be on a file system that all nodes share. The tasks find each other by SLURM's own variables. Ten
# minutes before the time is up SLURM sends SIGTERM: the run saves and ends, and the next job of the chain goes on; one
# that finds nothing left to do ends at once.
# Untested: no cluster was at hand; the command is checked by --dry-run alone.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $* See launch/slurm.sh --help." >&2; exit 2; }

dry="" nodes="" gpus=8 limit=24:00:00 partition="" name=ivr_jax chain=1 image="" command=()
while (($#)); do
  case "$1" in
    --dry-run) dry=yes ;;
    --nodes=?*) nodes="${1#*=}" ;;
    --gpus=?*) gpus="${1#*=}" ;;
    --time=?*) limit="${1#*=}" ;;
    --partition=?*) partition="${1#*=}" ;;
    --name=?*) name="${1#*=}" ;;
    --chain=?*) chain="${1#*=}" ;;
    --image=?*) image="${1#*=}" ;;
    -h | --help) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) fail "unknown argument '$1'." ;;
  esac
  shift
done
[[ -n "$nodes" ]] || fail "--nodes is needed: how many nodes the run takes."
[[ "$nodes" =~ ^[1-9][0-9]*$ && "$gpus" =~ ^[1-9][0-9]*$ && "$chain" =~ ^[1-9][0-9]*$ ]] ||
  fail "--nodes, --gpus and --chain must be whole numbers."
((${#command[@]})) || fail "say what to run after --, as: -- ivr_jax.train --config=emu35_sft --workdir=runs/sft."

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
step=(srun --kill-on-bad-exit=1)
if [[ -n "$image" ]]; then
  python=python
  step+=("--container-image=$image" "--container-mounts=$PWD:$PWD" "--container-workdir=$PWD")
fi
script="$(printf '%q ' "${step[@]}" "$python" -m "${command[@]}")"
queue=(
  sbatch "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" --exclusive "--time=$limit"
  --dependency=singleton --requeue --signal=TERM@600 --open-mode=append "--output=%x-%j.log" ${partition:+"--partition=$partition"}
  "--wrap=$script"
)
for ((job = 0; job < chain; job++)); do
  if [[ -n "$dry" ]]; then
    printf '%q ' "${queue[@]}"
    echo
  else
    "${queue[@]}"
  fi
done
