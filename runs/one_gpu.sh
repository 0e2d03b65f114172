#!/usr/bin/env bash
# An assistant of your own from a base model, on one GPU: conversations, LoRA fine-tuning, preference model,
# preference-aware training, evaluation. The base is a folder in the Hugging Face layout (Qwen3, Qwen2, Llama, GPT-J).
#
#   runs/one_gpu.sh --base models/Qwen3-0.6B                            with what the scripted teacher writes
#   runs/one_gpu.sh --base models/Qwen3-0.6B --data mine.jsonl          with your conversations: MOSS, OpenAI or ShareGPT
#   runs/one_gpu.sh --base models/Qwen3-0.6B --lora r=64                 a larger adapter
#   runs/one_gpu.sh --base models/moss-16B --lora r=16,base=int4        frozen weights of four bits: 16B on 24 GB
#   runs/one_gpu.sh --base models/Qwen3-0.6B --scale 0.01 --out out/ci  a hundredth of the material, to see that it works
#
# It can be stopped and started again at any time: finished stages are skipped, an interrupted one goes on where it was.
set -euo pipefail

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  echo "options: --base DIR  --out DIR (out/one_gpu, from the project's root)  --data FILE_OR_FOLDER  --pairs FILE"
  echo "  --lora SPEC (r=16)  --length N (1024)  --scale X (1: 20,000 conversations)  --seed N (0)"
}
fail() {
  echo "one_gpu.sh: $1" >&2
  exit "${2:-1}"
}

BASE="" OUT=out/one_gpu DATA="" PAIRS="" LORA=r=16 LENGTH=1024 SCALE=1 SEED=0
while [ $# -gt 0 ]; do
  case $1 in
    --base) BASE=$(realpath "${2:?--base needs a folder}") && shift 2 ;;
    --out) OUT=${2:?--out needs a folder} && shift 2 ;;
    --data) DATA=$(realpath "${2:?--data needs a file or folder}") && shift 2 ;;
    --pairs) PAIRS=$(realpath "${2:?--pairs needs a file}") && shift 2 ;;
    --lora) LORA=${2:?--lora needs a rank such as r=16} && shift 2 ;;
    --length) LENGTH=${2:?--length needs a number} && shift 2 ;;
    --scale) SCALE=${2:?--scale needs a number} && shift 2 ;;
    --seed) SEED=${2:?--seed needs a number} && shift 2 ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown option $1; see runs/one_gpu.sh --help" 2 ;;
  esac
done
[ -n "$BASE" ] || fail "--base DIR is missing: the folder of a base model such as Qwen3-0.6B" 2
[ -e "$BASE/config.json" ] || fail "--base $BASE holds no model: there is no config.json" 2
[[ $SCALE =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] || fail "--scale $SCALE is not a number such as 0.01" 2
[[ $SEED =~ ^[0-9]+$ ]] || fail "--seed $SEED is not a whole number" 2
[[ $LENGTH =~ ^[0-9]+$ ]] || fail "--length $LENGTH is not a whole number" 2
for given in "$DATA" "$PAIRS"; do
  [ -z "$given" ] || [ -e "$given" ] || fail "there is no $given" 2
done

cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || make .venv/.core
moss() { .venv/bin/python -m moss "$@"; }
scaled() { awk -v n="$1" -v s="$SCALE" -v least="$2" 'BEGIN { n = int(n * s + 0.5); print n < least ? least : n }'; }

# The settings, all in one place. Rates are those of adapters; a step is 16 rows.
DIALOGS=$(scaled 20000 50)
PROMPTS=$(scaled 4000 20)
QUESTIONS=$(scaled 100 2)
COMMON=(--lora "$LORA" --lr 2e-4 --schedule cosine --warmup 0.03 --length "$LENGTH" --batch-tokens $((16 * LENGTH)))
COMMON+=(--save-every 50 --seed "$SEED" --resume)
# Over integers a stage leaves its adapter, with which the next one goes on over the same base; else a merged model.
RESULT=""
[[ $LORA != *base=* ]] || RESULT=/adapter

# One folder holds one run: material of other settings must not be mixed in.
SETTINGS="base=$BASE data=${DATA:-teacher} pairs=${PAIRS:-teacher} lora=$LORA length=$LENGTH scale=$SCALE seed=$SEED"
mkdir -p "$OUT"
[ -e "$OUT/settings" ] || echo "$SETTINGS" > "$OUT/settings"
[ "$(cat "$OUT/settings")" = "$SETTINGS" ] || fail "$OUT was made with $(cat "$OUT/settings"), not $SETTINGS; choose another --out"

STARTED=$SECONDS
# stage NAME RESULT COMMAND...: run the command unless its result is there already, and insist that it is there after.
stage() {
  local name=$1 result=$2 began=$SECONDS
  shift 2
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
    return
  fi
  echo "== $name"
  "$@" || {
    local code=$?
    [ $code -ne 130 ] && [ $code -ne 143 ] || fail "stopped in $name; the same command goes on from there" $code
    exit $code
  }
  [ -e "$result" ] || fail "stopped in $name before $result was made; the same command goes on from there" 143
  echo "== $name: $((SECONDS - began)) s, $((SECONDS - STARTED)) s in all"
}

if [ -z "$DATA" ]; then
  DATA=$OUT/dialogs.jsonl
  stage "conversations ($DIALOGS)" "$DATA" \
    moss data curriculum --kind dialogs --n "$DIALOGS" --seed "$SEED" -o "$DATA"
fi
REPLIES=$PAIRS # a preference model orders the replies of preferences; without any of your own, the teacher's
if [ -z "$PAIRS" ]; then
  PAIRS=$OUT/pairs.jsonl REPLIES=$OUT/replies.jsonl
  stage "preferences ($PROMPTS questions, 6 replies each)" "$PAIRS" \
    moss data curriculum --kind preferences --n "$PROMPTS" --seed "$SEED" -o "$PAIRS"
  stage "their replies as conversations" "$REPLIES" \
    moss data curriculum --kind replies --n $((6 * PROMPTS)) --seed "$SEED" -o "$REPLIES"
fi

stage "fine-tuning" "$OUT/sft$RESULT/moss.json" \
  moss train sft --model "$BASE" --data "$DATA" --epochs 2 "${COMMON[@]}" --out "$OUT/sft"

stage "preference model" "$OUT/reward$RESULT/moss.json" \
  moss train reward --model "$OUT/sft$RESULT" --data "$PAIRS" "${COMMON[@]}" --out "$OUT/reward"

stage "preference-aware training" "$OUT/pat$RESULT/moss.json" \
  moss train pat --model "$OUT/sft$RESULT" --reward "$OUT/reward$RESULT" --data "$DATA" "$REPLIES" "${COMMON[@]}" \
  --out "$OUT/pat"

evaluate() { moss eval tools --model "$OUT/$1$RESULT" --n "$QUESTIONS" --limit "$QUESTIONS" --seed "$SEED" --out "$OUT/evals" --json > "$OUT/.eval" && mv "$OUT/.eval" "$OUT/eval-$1.json"; }
for model in sft pat; do
  stage "evaluation of $model ($QUESTIONS questions a set)" "$OUT/eval-$model.json" evaluate "$model"
done

answer() { moss chat --model "$OUT/pat$RESULT" -p "What is 37*12?" --max-tokens 256 --json > "$OUT/.answer" && mv "$OUT/.answer" "$OUT/answer.json"; }
stage "a first answer" "$OUT/answer.json" answer

echo "done in $((SECONDS - STARTED)) s: moss chat --model $OUT/pat$RESULT"
echo "--quality 20 asks it for a worse answer; $OUT/sft/adapter and $OUT/pat/adapter are the adapters alone"
