#!/bin/sh
# All checks and measurements that need a CUDA machine, in one run: outputs, times, memory, and nano trained further.
#
#   benchmarks/gpu.sh [--quick] [--toy] [--device DEVICE] [--train SECONDS] [--out FOLDER] [PART...]
#
# Needs Python with torch and the package's dependencies (PYTHON=..., default: python3); the package itself is taken from
# src/. Training nano needs data/nano/icons.npz (recipes/nano/README.md, step 1).
#
#   --quick   checks and the essential times
#   --toy     every part at toy size; with --device cpu this runs anywhere
#   --train   seconds for nano's base (default: 150; 0 leaves it out)
#   --limit   seconds for everything (default: 470); parts whose own limit does not fit in are left out, so that a longer
#             --train needs a higher one
#   --out     JSON, logs and weights, together in results.tar.gz (default: gpu-results)
#   PART      run these parts alone, by the names below
#
# Each part has its own time limit. One that fails or is too slow does not stop the next. The most important parts run
# first; summary.json has the status, seconds and limit of each. Exits with 1 if one failed.
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
device=cuda train=150 limit_of_all=470 out=gpu-results quick= toy= parts=
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --toy) toy=1 ;;
        --device) device=$2; shift ;;
        --train) train=$2; shift ;;
        --limit) limit_of_all=$2; shift ;;
        --out) out=$2; shift ;;
        -h | --help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "gpu.sh: unknown option $1; see --help" >&2; exit 2 ;;
        *) parts="$parts $1" ;;
    esac
    shift
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
bench=$root/benchmarks
rows=$out/.summary
: >"$rows"
failed=0
began=$(date +%s)

if [ "$toy" ]; then
    limit_of_all=86400 # only what is slow on a GPU is wrong
    model="--base nano --dtype fp32" size="--rounds 1 --warm-up 0" steps="--steps 2" rank="--rank 2"
    adapter1="--batch 1" adapter4="--batch 2" control4="--batch 2" four="--seeds 2"
    nano="--trial 1 --set batch_size=2 --set variants=1"
else
    model="--base sd15 --random-weights" size="--rounds 3" steps="--steps 20" rank="--rank 128"
    adapter1="--batch 1 --no-checkpointing" adapter4="--batch 4" control4="--batch 4" four="--seeds 4"
    nano="--set batch_size=512 --set variants=24 --set learning_rate=1e-3 --set precision=bf16"
fi
[ "$quick" ] && size="--rounds 2"

# part NAME LIMIT_SECONDS COMMAND...: run it, with its output in a log.
part() {
    name=$1 limit=$2
    shift 2
    case " $parts " in "  " | *" $name "*) ;; *) return ;; esac
    printf '%s ...\n' "$name"
    started=$(date +%s)
    left=$((limit_of_all - (started - began)))
    [ -z "$toy" ] || limit=$left
    if [ "$left" -lt "$limit" ] || [ "$left" -lt 10 ]; then
        printf '%s: left out, no time\n' "$name"
        printf '%s\tleft out\t0\t%s\n' "$name" "$limit" >>"$rows"
        return
    fi
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    seconds=$(($(date +%s) - started))
    case $status in
        0) told=done ;;
        124 | 137) told="stopped at its limit" failed=1 ;;
        *) told="failed with status $status" failed=1 ;;
    esac
    printf '%s: %s, %s s\n' "$name" "$told" "$seconds"
    [ "$told" = "done" ] || tail -n 8 "$out/$name.log"
    printf '%s\t%s\t%s\t%s\n' "$name" "$told" "$seconds" "$limit" >>"$rows"
}

# shellcheck disable=SC2086 # the settings are lists of words
{
    part training_checks 45 "$python" "$bench/gpu_checks.py" --only training --device "$device" \
        --out "$out/training_checks.json"
    part sampling_checks 60 "$python" "$bench/gpu_checks.py" --only sampling --device "$device" \
        --out "$out/sampling_checks.json"
    part ctrlora_sampling 75 "$python" "$bench/ctrlora_sampling.py" $model $size $steps $rank --device "$device" \
        --conditions 1 --seeds 1 4 --out "$out/ctrlora_sampling.json"
    part adapter_training 45 "$python" "$bench/adapter_training.py" $model $size $rank --device "$device" $adapter1 \
        --out "$out/adapter_training.json"
    if [ "$train" != 0 ] && [ -z "$quick" ]; then
        part nano $((train + 30)) "$python" "$bench/train_for.py" recipes/nano/base-concepts.yaml --seconds "$train" \
            --device "$device" --out "$out/nano" --set start=nano $nano
    fi
    if [ -z "$quick" ]; then
        part controlnet_training 60 "$python" "$bench/controlnet_training.py" $model $size --device "$device" $control4 \
            --out "$out/controlnet_training.json"
        part adapter_training_batch 45 "$python" "$bench/adapter_training.py" $model $size $rank --device "$device" \
            $adapter4 --out "$out/adapter_training_batch.json"
        part controlnet_sampling 80 "$python" "$bench/controlnet_sampling.py" $model $size $steps $four \
            --device "$device" --out "$out/controlnet_sampling.json"
        part finetuning_cost 60 "$python" "$bench/finetuning_cost.py" $model $size $rank --device "$device" $control4 \
            --out "$out/finetuning_cost.json"
        if [ -z "$toy" ]; then
            part memory 70 "$python" "$bench/memory.py" --device "$device" --out "$out/memory.json" \
                --only "as the reference does" "+ frozen weights in bf16" "+ gradient checkpointing" \
                "ours, bf16, base as a graph" "ControlNet, bf16" "ControlNet, bf16, base as a graph"
            part what_pays 45 "$python" "$bench/what_pays.py" $model $size --device "$device" --batch 4 \
                --out "$out/what_pays.json"
            part controlnet_sampling_compiled 120 "$python" "$bench/controlnet_sampling.py" $model $size $steps $four \
                --device "$device" --compiled --out "$out/controlnet_sampling_compiled.json"
            part controlnet_training_compiled 150 "$python" "$bench/controlnet_training.py" $model $size $control4 \
                --device "$device" --compiled --out "$out/controlnet_training_compiled.json"
        fi
    fi
}

"$python" - "$rows" "$out/summary.json" <<'END'
import json
import sys

rows = [line.rstrip("\n").split("\t") for line in open(sys.argv[1], encoding="utf-8")]
parts = [{"part": row[0], "status": row[1], "seconds": int(row[2]), "limit_seconds": int(row[3])} for row in rows]
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"parts": parts, "seconds": sum(part["seconds"] for part in parts)}, file, indent=2)
END
rm -f "$rows"
# One file to take away: figures, logs and trained weights, without states.
(cd "$out" && tar -czf results.tar.gz --exclude=results.tar.gz --exclude='state*.safetensors' .)
exit $failed
