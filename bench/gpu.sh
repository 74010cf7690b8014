#!/usr/bin/env bash
# What wants a GPU, in one go: the flagship for 60 epochs with three seeds, Task II with a ResNet34 that
# keeps every pixel, latency and memory of the twin in bfloat16, eager and compiled.
#
#     bash bench/gpu.sh DATA OUTPUT [--set NAME=JSON ...]
#
# DATA holds train.parquet and validation.parquet. Interrupted, the same command goes on. On a machine
# without a GPU it tries the same on the CPU: --set epochs=1 limit=64 img_size=32, LATENCY="--batches 1".
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 output=$2
shift 2
device=$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
latency=${LATENCY:---batches 64,256}
mkdir -p "$output/results"

for compiled in "" --compiled; do
  name=latency-dwg_densenet121-224px-bfloat16-channels_last${compiled/--/-}-$device
  # shellcheck disable=SC2086
  pytest -q bench --device "$device" --precision bfloat16 --channels-last $compiled $latency \
    --benchmark-json="$output/$name.json"
  python bench/cost.py latency --json "$output/$name.json" --output "$output/results/$name.csv"
done
for benchmark in flagship60 task2; do
  python bench/run.py "$benchmark" --data "$data" --output "$output" "$@" \
    --csv "$output/results/$benchmark-$device.csv"
done
echo "Copy $output/results/*.csv to bench/results/ under names that say the conditions; python bench/report.py"
