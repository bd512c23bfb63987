#!/usr/bin/env bash
# Repeats the quality table of RESULTS.md: the quickstart's run for 3 seeds, and the paper's softmax without the popularity prior.
# About 5 minutes a run on 2 CPU cores; needs the quickstart's data (make quickstart). Nothing else should run beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore WANDB_MODE=disabled
export MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456

one() { # name, then overrides
    local name=$1
    shift
    deepspeed --num_accelerators 2 launch/pretrain.py "run.name=$name" "$@"
    python launch/evaluate.py "checkpoint=runs/$name" baselines=false
}

for seed in ${SEEDS:-0 1 2}; do
    one "prior-seed$seed" run.seed="$seed" data.loader.seed="$seed"
done
one legal-seed0 data.softmax=legal
