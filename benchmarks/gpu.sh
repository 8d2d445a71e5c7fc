#!/usr/bin/env bash
# Measures on one GPU, in at most 10 minutes, what a CPU cannot tell; the most important first:
#   steps-256, steps-1024        training and sampling steps at 64 -> 256 and 64 -> 1024 px, and their share of the GPU's peak (MFU),
#                                against models of diffusers and a plain transformer with as many parameters
#   core                         the compiled core alone, in large batches: its share of the peak
#   sampling-256, sampling-1024  what makes sampling fast, CUDA graphs among it
#   compiled-256, compiled-1024  the steps again, with compiled blocks
#   profile                      where a training step's time goes: as it is, in channels_last, and with compiled blocks
#   graphs-256                   sampling with the whole model as CUDA graphs, which takes long to compile
#   stickers                     a training with its images, for the minutes that are left
#
#   bash benchmarks/gpu.sh RESULTS [DATA]     # DATA: the folder that training_examples/data/stickers.py has written
#
# A part that has left its results in the folder RESULTS does not run again, so what is missing can be run later. The exit code is 0
# once every part is there. Settings are variables of the environment:
#   MINUTES=10              for all parts together
#   PARTS="steps-256 ..."   the parts to run, all by default
#   SIZES=tiny              rehearse on a CPU with tiny models, one size and few arms: the figures mean nothing
#   TEXT_ENCODER=small      train the stickers' text encoder, too, instead of fetching a pretrained one from the Hub
#   PYTHON=python           the interpreter
set -uo pipefail

ALL="steps-256 steps-1024 core sampling-256 compiled-256 profile compiled-1024 sampling-1024 graphs-256 stickers"
[[ $# -ge 1 && $# -le 2 ]] || { sed -n '2,/^set/{/^set/!p}' "$0" >&2; exit 2; }
mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd)
data=${2:+$(cd "$2" && pwd)} || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python} sizes=${SIZES:-full} deadline=$((SECONDS + ${MINUTES:-10} * 60))
missing=() job=

# `timeout` keeps Ctrl-C from the command, which would go on to the end of its time, and with it this script.
trap 'kill -TERM $job 2> /dev/null; wait; echo "Stopped. Run this again for the rest."; exit 130' INT TERM HUP

# part NAME SECONDS COMMAND...: run a command for at most this long, unless it has succeeded before.
part() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code
    shift 2
    if [[ -e $results/$name.done ]]; then
        echo "$name: is there already"
        return
    fi
    ((limit < left)) || limit=$left
    if ((limit < 5)); then
        echo "$name: no time is left"
        missing+=("$name")
        return
    fi
    timeout --signal=TERM --kill-after=20 "$limit" "$@" > "$results/$name.log" 2>&1 &
    job=$!
    wait "$job"
    code=$? job=
    if [[ $code == 0 ]]; then
        touch "$results/$name.done"
        echo "$name: done in $((SECONDS - started)) s"
        return
    fi
    missing+=("$name")
    if [[ $code == 124 || $code == 137 ]]; then
        echo "$name: cut off after $limit s, see $results/$name.log"
    else
        echo "$name: failed with exit code $code, see $results/$name.log:"
        tail -n 3 "$results/$name.log"
    fi
}

# The models: a core of 16 x 16 tokens at 64 px with one stage around it, 230 to 250 million parameters. There is no time to compile
# all of a UNet2DModel, which names no blocks.
case $sizes in
full)
    parts=${PARTS:-$ALL}
    core="--hidden_size 1024 --num_layers 12 --repeats 5"
    small="$core --resolutions 256 --factor 4 --channels 128 256 --batch_size 16"
    large="$core --resolutions 1024 --factor 16 --channels 64 128 256 512 --batch_size 2"
    alone="--hidden_sizes 1024 2048 --batch_size 64 --repeats 5"
    models=()
    compiled=(--models "ours" "ours, detail phase" "ours, core phase" UNet2DConditionModel DiTTransformer2DModel "plain transformer")
    small_model="64 -> 256" large_model="64 -> 1024" arms=(--together --repeats 2)
    levers=("channels last" "compiled blocks") backend=inductor training="--mixed_precision bf16"
    ;;
tiny)
    parts=${PARTS:-steps-256 sampling-256 compiled-256 profile graphs-256 stickers}
    small="--hidden_size 64 --num_layers 1 --repeats 1 --batch_size 1 --resolutions 32 --factor 2 --channels 8"
    large=$small alone="--hidden_sizes 64 --batch_size 1 --repeats 1"
    models=(--without_memory --models "ours" "ours, core phase" "plain transformer") compiled=(--models "ours")
    small_model="8 -> 16" large_model="8 -> 16" arms=(--arms "plain loop" "... + compiled blocks" --repeats 1)
    levers=("compiled blocks") backend=eager
    training="--mixed_precision no --dataloader_num_workers 0 --resolutions 8 16 --hidden_size 16 --num_layers 1
        --num_attention_heads 2 --block_out_channels 8 --train_batch_size 2 2 --num_validation_images 2 --num_inference_steps 2"
    ;;
*)
    echo "SIZES=$sizes is unknown: it must be full or tiny." >&2
    exit 2
    ;;
esac

run_steps() { # NAME SIZE
    # shellcheck disable=SC2086
    part "$1" 90 "$python" -m benchmarks.step_time $2 "${models[@]}" --results_dir "$results/$1"
}

run_compiled() { # NAME SIZE
    # shellcheck disable=SC2086
    part "$1" 100 "$python" -m benchmarks.step_time $2 --compiled --backend "$backend" \
        --without_memory "${compiled[@]}" --results_dir "$results/$1"
}

run_core() {
    # shellcheck disable=SC2086
    part core 80 "$python" -m benchmarks.step_time --core --compiled --backend "$backend" $alone --results_dir "$results/core"
}

run_profile() {
    # shellcheck disable=SC2086
    part profile 90 "$python" -m benchmarks.step_profile $small --levers "${levers[@]}" --backend "$backend" \
        --results_dir "$results/profile"
}

run_sampling() { # NAME MODEL ARMS...
    part "$1" 110 "$python" -m benchmarks.sampling --models "$2" "${@:3}" --backend "$backend" --results_dir "$results/$1"
}

run_stickers() {
    if [[ -z $data ]]; then
        echo "stickers: skipped, no DATA is given"
        return
    fi
    local config=training_examples/configs/stickers_64_256.yaml folder=$results/stickers steps=$results/stickers.steps
    # The configuration takes some ten minutes: as many of its steps as the time allows, in one that begins with enough of it. A run
    # that was cut off keeps its number.
    if [[ ! -e $steps ]]; then
        local share=$((deadline - SECONDS - 60))
        if [[ $sizes == tiny ]]; then
            share=1
        elif ((share < 60)); then
            echo "stickers: no time is left"
            missing+=(stickers)
            return
        fi
        echo "--core_steps $((share * 5)) --detail_steps $((share * 2)) --joint_steps $((share / 2 + 1))" > "$steps"
    fi
    mkdir -p "$folder"
    if [[ ${TEXT_ENCODER:-} == small ]]; then
        grep -v '^text_' $config > "$results/stickers.yaml"
    else
        sed "s#^text_embeddings_dir:.*#text_embeddings_dir: $results/stickers-text#" $config > "$results/stickers.yaml"
    fi
    # shellcheck disable=SC2046,SC2086
    part stickers 100000 "$python" training_examples/grow.py --config "$results/stickers.yaml" \
        --train_data_dir "$data" --output_dir "$folder" $(cat "$steps") $training --resume_from_checkpoint latest
}

for name in $parts; do
    case $name in
    steps-256) run_steps "$name" "$small" ;;
    steps-1024) run_steps "$name" "$large" ;;
    core) run_core ;;
    sampling-256) run_sampling "$name" "$small_model" "${arms[@]}" ;;
    sampling-1024) run_sampling "$name" "$large_model" "${arms[@]}" ;;
    graphs-256) run_sampling "$name" "$small_model" --whole --repeats 2 ;;
    profile) run_profile ;;
    compiled-256) run_compiled "$name" "$small" ;;
    compiled-1024) run_compiled "$name" "$large" ;;
    stickers) run_stickers ;;
    *)
        echo "$name: is no part; the parts are $ALL" >&2
        missing+=("$name")
        ;;
    esac
done

cat "$results"/*/*.md > "$results/report.md" 2> /dev/null
if ((${#missing[@]})); then
    echo "Missing: ${missing[*]}. Run this again for them."
    exit 1
fi
echo "All parts are in $results."
