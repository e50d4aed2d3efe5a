#!/usr/bin/env bash
# What a GPU has to tell, in independent parts, the most telling first: 12 minutes at most, each part's JSON as soon as
# it is done. A part that fails or runs out of time leaves the others alone; the exit code says how many did.
#
#     benchmarks/gpu.sh FOLDER              on a GPU
#     benchmarks/gpu.sh FOLDER --rehearse   the same code on the CPU, with a tiny model
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:?give the folder that the JSON files go to}
rehearse=${2:-}
mkdir -p "$folder"
failed=0

part() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name, at most $seconds s"
    timeout "$seconds" "$@" --json "$folder/$name.json" || { echo "== $name failed ($?)"; failed=$((failed + 1)); }
}

python=${PYTHON:-python3}
overhead=(--device cuda --model roberta-base --rounds 40)
[ -n "$rehearse" ] && overhead=(--device cpu --model tiny --rounds 2 --batch-size 2)
part training 240 "$python" -m benchmarks.gpu training $rehearse
part tests 120 "$python" -m benchmarks.gpu tests $rehearse
part side_by_side 200 "$python" -m benchmarks.gpu side_by_side $rehearse
part overhead 160 "$python" -m benchmarks.overhead "${overhead[@]}"
exit $failed
