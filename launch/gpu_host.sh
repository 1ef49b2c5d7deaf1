#!/usr/bin/env bash
# A run on the GPUs of this machine, in one process: JAX uses all of them through the mesh of the config.
#
#   launch/gpu_host.sh [--gpus=8] -- ivr_jax.train --config=emu35_sft --workdir=runs/sft --config.mesh.fsdp=8
#
#   --dry-run        print the command and its environment, and run nothing
#   --gpus=N         use the first N GPUs (default: 8)
#
# The product of the mesh sizes must be the number of GPUs; one of them may be -1.
# PYTHON names the interpreter (default: .venv/bin/python of this checkout, with '.[gpu]' installed).
# Untested on a GPU: no GPU was at hand; the command is checked by --dry-run alone.
set -euo pipefail

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() { echo "error: $* See launch/gpu_host.sh --help." >&2; exit 2; }

dry="" gpus=8 command=()
while (($#)); do
  case "$1" in
    --dry-run) dry=yes ;;
    --gpus=?*) gpus="${1#*=}" ;;
    -h | --help) usage; exit 0 ;;
    --) shift; command=("$@"); break ;;
    *) fail "unknown argument '$1'." ;;
  esac
  shift
done
[[ "$gpus" =~ ^[1-9][0-9]*$ ]] || fail "--gpus must be a whole number."
((${#command[@]})) || fail "say what to run after --, as: -- ivr_jax.train --config=emu35_sft --workdir=runs/sft."

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment=(
  "CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))"
  "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"                          # the rest is for NCCL and cuDNN
  "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true"     # collectives run beside work
  "JAX_PLATFORMS=cuda"                                           # an error instead of a run on the CPU
)
line=(env "${environment[@]}" "${PYTHON:-$root/.venv/bin/python}" -m "${command[@]}")
if [[ -n "$dry" ]]; then
  printf '%q ' "${line[@]}"
  echo
  exit 0
fi
exec "${line[@]}"
