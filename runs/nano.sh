#!/usr/bin/env bash
# A nano model from nothing, every stage once: material, tokenizer, pre-training, fine-tuning and its evaluation, then
# preferences: a model of mixed manners, a preference model, and PAT, DPO and PPO with it; under 20 minutes on two cores.
#
#   runs/nano.sh                             a nano in out/nano/sft; the last three beside it, in pat, dpo and ppo
#   runs/nano.sh --scale 0.05 --out out/ci   the same road with a twentieth of the steps, to see that it works
#   runs/nano.sh --bundle                    the bundled model: more steps, written to moss/models/nano at the end
#
# It can be stopped and started again at any time: finished stages are skipped, an interrupted one goes on where it was.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  echo "options: --scale X (0.05)  --out DIR (out/nano, from the project's root)  --seed N (0)  --bundle"
}
fail() {
  echo "nano.sh: $1" >&2
  exit "${2:-1}"
}

SCALE=1 OUT="" SEED=0 BUNDLE=""
while [ $# -gt 0 ]; do
  case $1 in
    --scale) SCALE=${2:?--scale needs a number} && shift 2 ;;
    --out) OUT=${2:?--out needs a folder} && shift 2 ;;
    --seed) SEED=${2:?--seed needs a number} && shift 2 ;;
    --bundle) BUNDLE=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown option $1; see runs/nano.sh --help" 2 ;;
  esac
done
[[ $SCALE =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]] || fail "--scale $SCALE is not a number such as 0.05" 2
[[ $SEED =~ ^[0-9]+$ ]] || fail "--seed $SEED is not a whole number" 2
[ -z "$BUNDLE" ] || awk -v s="$SCALE" 'BEGIN { exit !(s >= 1) }' || fail "--bundle replaces the bundled model: not with --scale $SCALE" 2

# The settings, all in one place. A step is 8,192 tokens; rows of material are made for about one pass over them.
DEPTH=4
VOCAB=4096
if [ -n "$BUNDLE" ]; then
  OUT=${OUT:-out/bundle} PRETRAIN_STEPS=300 SFT_STEPS=3600
else
  OUT=${OUT:-out/nano} PRETRAIN_STEPS=100 SFT_STEPS=390
fi
QUESTIONS=40 PREFERENCE_STEPS=40 PPO_STEPS=8

cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || make .venv/.core
moss() { .venv/bin/python -m moss "$@"; }
scaled() { awk -v n="$1" -v s="$SCALE" -v least="$2" 'BEGIN { n = int(n * s + 0.5); print n < least ? least : n }'; }

PRETRAIN_STEPS=$(scaled $PRETRAIN_STEPS 5)
SFT_STEPS=$(scaled $SFT_STEPS 10)
QUESTIONS=$(scaled $QUESTIONS 1)
PREFERENCE_STEPS=$(scaled $PREFERENCE_STEPS 2)
PPO_STEPS=$(scaled $PPO_STEPS 2)
DOCUMENTS=$((PRETRAIN_STEPS * 100 + 500))
DIALOGS=$((SFT_STEPS * 12 + 200))
PROMPTS=$((PREFERENCE_STEPS * 10 + 20))

# One folder holds one run: material of other settings must not be mixed in.
SETTINGS="depth=$DEPTH vocab=$VOCAB pretrain=$PRETRAIN_STEPS sft=$SFT_STEPS seed=$SEED"
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

stage "plain text ($DOCUMENTS documents)" "$OUT/text.jsonl" \
  moss data curriculum --kind text --n "$DOCUMENTS" --seed "$SEED" -o "$OUT/text.jsonl"

stage "conversations ($DIALOGS)" "$OUT/dialogs.jsonl" \
  moss data curriculum --kind dialogs --n "$DIALOGS" --seed "$SEED" -o "$OUT/dialogs.jsonl"

stage "tokenizer ($VOCAB ids)" "$OUT/tokenizer/tokenizer.json" \
  moss train tokenizer --data "$OUT/text.jsonl" "$OUT/dialogs.jsonl" --vocab-size "$VOCAB" --out "$OUT/tokenizer"

stage "pre-training ($PRETRAIN_STEPS steps)" "$OUT/base/moss.json" \
  moss train pretrain --data "$OUT/text.jsonl" --model "$OUT/tokenizer" --depth "$DEPTH" --length 256 \
  --steps "$PRETRAIN_STEPS" --save-every 50 --seed "$SEED" --out "$OUT/base" --resume

stage "fine-tuning ($SFT_STEPS steps)" "$OUT/sft/moss.json" \
  moss train sft --model "$OUT/base" --data "$OUT/dialogs.jsonl" --length 1024 \
  --steps "$SFT_STEPS" --save-every 50 --seed "$SEED" --out "$OUT/sft" --resume

evaluate() { moss eval tools --model "$OUT/sft" --n "$QUESTIONS" --limit "$QUESTIONS" --seed "$SEED" --out "$OUT/evals" --json > "$OUT/.eval" && mv "$OUT/.eval" "$OUT/eval.json"; }
stage "evaluation ($QUESTIONS questions a set)" "$OUT/eval.json" \
  evaluate

# What follows shows the stages of preferences on questions whose answers a program judges; the model to talk to is sft.
if [ -z "$BUNDLE" ]; then
  prefer() { moss train "$1" --length 1024 --steps "$PREFERENCE_STEPS" --save-every 20 --seed "$SEED" --out "$OUT/$1" --resume "${@:2}"; }

  stage "preferences ($PROMPTS questions, 6 replies each)" "$OUT/pairs.jsonl" \
    moss data curriculum --kind preferences --n "$PROMPTS" --seed "$SEED" -o "$OUT/pairs.jsonl"

  stage "their replies as conversations" "$OUT/replies.jsonl" \
    moss data curriculum --kind replies --n $((6 * PROMPTS)) --seed "$SEED" -o "$OUT/replies.jsonl"

  stage "a model of mixed manners" "$OUT/mixed/moss.json" \
    moss train sft --model "$OUT/sft" --data "$OUT/replies.jsonl" --length 1024 --steps "$PREFERENCE_STEPS" \
    --save-every 20 --seed "$SEED" --out "$OUT/mixed" --resume

  stage "preference model" "$OUT/reward/moss.json" prefer reward --model "$OUT/mixed" --data "$OUT/pairs.jsonl"

  stage "preference-aware training" "$OUT/pat/moss.json" \
    prefer pat --model "$OUT/mixed" --reward "$OUT/reward" --data "$OUT/replies.jsonl"

  stage "direct preference optimisation" "$OUT/dpo/moss.json" \
    prefer dpo --model "$OUT/mixed" --data "$OUT/pairs.jsonl"

  stage "PPO" "$OUT/ppo/moss.json" \
    moss train ppo --model "$OUT/mixed" --reward "$OUT/reward" --data "$OUT/pairs.jsonl" --steps "$PPO_STEPS" \
    --batch-tokens 8192 --max-tokens 64 --seed "$SEED" --out "$OUT/ppo" --resume
fi

if [ -n "$BUNDLE" ]; then
  mkdir -p moss/models/nano
  for file in model.safetensors config.json tokenizer.json tokenizer_config.json moss.json; do
    install -m 644 "$OUT/sft/$file" moss/models/nano/
  done
  echo "bundled: $(du -ch moss/models/nano/* | tail -n 1 | cut -f 1) in moss/models/nano"
fi
echo "done in $((SECONDS - STARTED)) s: moss chat --model $OUT/sft"
