#!/usr/bin/env bash
# The whole loop on a laptop, one stage after the other, with the commands that `make demo` prints.
#
#   launch/laptop.sh [--dry-run] [--out=FOLDER]
#
#   --dry-run      print the commands, run nothing
#   --out=FOLDER   where everything goes (default: runs/laptop in the checkout)
#
# PYTHON names the interpreter (default: the one that `make install` made). Every stage resumes where it was stopped,
# so this script can be interrupted and started again.
set -euo pipefail

out=runs/laptop
dry_run=no
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=yes ;;
    --out=/*) out="${argument#--out=}" ;;
    --out=?*) out="$PWD/${argument#--out=}" ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "error: unknown argument '$argument'. See launch/laptop.sh --help." >&2; exit 2 ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." # the commands name files of the checkout
python="${PYTHON:-.venv/bin/python}"
if [ "$dry_run" = no ] && ! command -v "$python" > /dev/null; then
  echo "error: there is no $python. Run 'make install' first, or set PYTHON." >&2
  exit 2
fi

# stage WHAT WHY COMMAND...: says what comes and why, shows the command, and runs it.
stage() {
  printf '\n== %s: %s\n ' "$1" "$2"
  shift 2
  printf ' %q' "$@"
  printf '\n'
  if [ "$dry_run" = no ]; then
    "$@"
  fi
}

stage "image tokenizer" "learns to turn rendered scenes into a few codes, and codes back into pixels" \
  "$python" -m ivr_jax.train --config=configs/micro_image_tokenizer.py --workdir="$out/image_tokenizer"

stage "construct, for the base" "exact drawings to learn from, and failed ones to learn to judge" \
  "$python" -m ivr_jax.construct --config=configs/micro_construct_base.py --workdir="$out/construct_base"

stage "base" "learns to answer with one image, and to evaluate it" \
  "$python" -m ivr_jax.train --config=configs/micro_base.py --workdir="$out/base" \
  --config.image_tokenizer="$out/image_tokenizer" --config.data.path="$out/construct_base/dataset"

stage "construct" "builds trajectories: draw, evaluate, reflect up to three times, then decompose into steps" \
  "$python" -m ivr_jax.construct --config=configs/micro_construct.py --workdir="$out/construct" \
  --config.baseline="$out/base"

stage "sft" "learns to reflect and to decompose from the trajectories, with the selective loss mask" \
  "$python" -m ivr_jax.train --config=configs/micro_sft.py --workdir="$out/sft" \
  --config.image_tokenizer="$out/image_tokenizer" --config.init="$out/base" \
  --config.data.path="$out/construct/dataset"

stage "rl" "GRPO: rewards the outcome and every step, with a bonus for answers as short as the request allows" \
  "$python" -m ivr_jax.train --config=configs/micro_rl.py --workdir="$out/rl" --config.init="$out/sft"

for model in base sft rl; do
  stage "evaluate $model" "answers held-out requests and scores the pixels" \
    "$python" -m ivr_jax.evaluate --config=configs/micro_evaluate.py --workdir="$out/evaluate_$model" \
    --config.init="$out/$model"
done

stage "report" "one page with the curves, the tables, and a gallery of answers as they unfolded" \
  "$python" -m ivr_jax.report --workdir="$out"

if [ "$dry_run" = no ]; then
  printf '\nEverything is in %s; open %s/report.html in a browser.\n' "$out" "$out"
fi
