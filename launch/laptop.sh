#!/usr/bin/env bash
# The whole loop on a laptop: image tokenizer, base, construction, SFT, RL, evaluation, report.
#
#   launch/laptop.sh [--dry-run] [--out=FOLDER]
#
#   --dry-run      print the commands, one a line, and run nothing
#   --out=FOLDER   where everything goes (default: runs/laptop in the checkout)
#
# PYTHON names the interpreter (default: the one that `make install` made). Every stage resumes where it was stopped,
# so this script can be interrupted and started again.
set -euo pipefail

out=runs/laptop
flags=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) flags+=(--dry_run) ;;
    --out=/*) out="${argument#--out=}" ;;
    --out=?*) out="$PWD/${argument#--out=}" ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown argument '$argument'. See launch/laptop.sh --help." >&2; exit 2 ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." # the configs of the checkout are used
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" > /dev/null; then
  echo "error: there is no $python. Run 'make install' first, or set PYTHON." >&2
  exit 2
fi
exec "$python" -m ivr_jax.demo --workdir="$out" ${flags[@]+"${flags[@]}"}
