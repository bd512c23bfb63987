#!/usr/bin/env bash
# The whole chain on a synthetic ad market whose truth is known: logs, shards, tokenizer, pretraining, value-aware fine-tuning, simulator,
# policy optimisation, and what each policy earns when it serves the market. At most 20 minutes on 2 CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
export PYTHONWARNINGS=ignore WANDB_MODE=${WANDB_MODE:-disabled}
# glibc would hand every large temporary back to the system and fault it in again; on CPU that costs more than the arithmetic.
export MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456
name=${RUN_NAME:-pipeline}

say() { printf '\n== %s  (%d s)\n' "$1" $((SECONDS - started)); }

say "1/5 the market's logs"
python launch/make_market.py --config configs/market/quickstart.yaml
say "2/5 logs to shards"
python launch/build_data.py --config configs/data/market.yaml
say "3/5 semantic IDs"
python launch/fit_tokenizer.py --config configs/tokenizer/market.yaml
say "4/5 the simulator: pCTR and pCVR learned from the logs"
[ -f data/market/simulator/simulator.json ] || python launch/fit_simulator.py --config configs/simulator.yaml
say "5/5 pretraining, value-aware fine-tuning, HEPO; each policy serves the market"
python launch/table3.py "name=$name" 'seeds=[0]' 'only=[mtp, vaft, hepo]' ranks=2 "$@"
say "done"
