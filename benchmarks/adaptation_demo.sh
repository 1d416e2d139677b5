#!/usr/bin/env bash
# From a fine-tune to a fast fine-tune, over HTTP: starts a server, posts a fine-tune with curl, watches its job, and
# measures the same requests with no draft, with the shared draft (what the fine-tune had at first) and with its own
# private module (what it has now).
#
#   benchmarks/adaptation_demo.sh [FINE_TUNE_DIRECTORY [TRAINING_PROMPTS_JSONL [MEASURED_PROMPTS_JSONL]]]
#
# Without arguments: the bundled code LoRA under another name, trained on prompts that are read from the interpreter's
# standard library, measured on those in benchmarks/prompts/code.jsonl. What is measured is never trained on.
#
# Environment: MODELS (family directory, default models), NAME (name to serve under, default demo), TRAINING (JSON
# object for "training"), NUM_PROMPTS (prompts to measure with, default 8), MAX_TOKENS (of an answer, default 96),
# PORT (default 8765), DATA_DIR (default: a temporary directory that is removed). QUICK=1 shows the same with fewer and
# shorter answers and a short training, and gains less.
set -euo pipefail
cd "$(dirname "$0")/.."

models=${MODELS:-models}
fine_tune=$(realpath "${1:-$models/code}")
measured=$(realpath "${3:-benchmarks/prompts/code.jsonl}")
name=${NAME:-demo}
url=http://127.0.0.1:${PORT:-8765}
python=.venv/bin/python
training={} num_prompts=8 max_tokens=96
if [ -n "${QUICK:-}" ]; then
  training='{"max_prompts": 120, "max_tokens": 48, "num_steps": 40, "held_out": 8}' num_prompts=4 max_tokens=48
fi
training=${TRAINING:-$training}

data_dir=${DATA_DIR:-}
if [ -z "$data_dir" ]; then
  data_dir=$(mktemp -d)
  remove=$data_dir
fi
server=
probe=
cleanup() {
  [ -z "$probe" ] || kill "$probe" 2>/dev/null || true
  if [ -n "$server" ]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  [ -z "${remove:-}" ] || rm -rf "$remove"
}
trap cleanup EXIT

prompts=${2:+$(realpath "$2")}
if [ -z "$prompts" ]; then
  prompts=$data_dir/training-prompts.jsonl
  $python - "$prompts" <<'PY'
import json, sys
from recipes.standard_library import standard_library_rows
from recipes.text import shuffled
rows = shuffled(standard_library_rows(held_out=False), seed=0)[:1500]
open(sys.argv[1], "w").writelines(json.dumps({"prompt": row.prompt}) + "\n" for row in rows)
PY
fi

export EDA_ADAPTER_ROOTS="$fine_tune:$(dirname "$prompts")"
.venv/bin/eda serve --models-dir "$models" --port "${url##*:}" --data-dir "$data_dir" --log-level warning \
  >"$data_dir/server.log" 2>&1 &
server=$!
until curl -sf "$url/ready" >/dev/null; do
  kill -0 "$server" 2>/dev/null || { cat "$data_dir/server.log" >&2; exit 1; }
  sleep 0.5
done

echo "== POST /adapters"
body=$($python - "$name" "$fine_tune" "$prompts" "$training" <<'PY'
import json, sys
name, fine_tune, prompts, training = sys.argv[1:]
print(json.dumps({
    "name": name,
    "target": {"path": fine_tune},
    "data": {"path": prompts},
    "training": json.loads(training),
    "triage": False,
    "activate": "always",
}))
PY
)
answer=$(curl -s "$url/adapters" -H 'Content-Type: application/json' -d "$body")
job=$($python -c 'import json,sys; a=json.load(sys.stdin); print(a["job"]["id"] if "job" in a else sys.exit(str(a)))' <<<"$answer")
echo "$name is served already, with the shared draft alone; its job is $job"

$python -m benchmarks.adaptation_requests estimate "$url" "$name" "$prompts" --training "$training"
[ -n "${QUICK:-}" ] || echo "QUICK=1 does less of everything"

echo "== GET /jobs/$job/events"
$python -m benchmarks.adaptation_requests probe "$url" "$name" "$measured" "$data_dir/probe.json" &
probe=$!
started=$SECONDS
curl -sN "$url/jobs/$job/events" | $python -m benchmarks.adaptation_requests watch
kill "$probe" 2>/dev/null || true
wait "$probe" 2>/dev/null || true
probe=
echo "the job took $((SECONDS - started)) s"

$python -m benchmarks.adaptation_requests compare "$url" "$name" "$measured" \
  --num-prompts "${NUM_PROMPTS:-$num_prompts}" --max-tokens "${MAX_TOKENS:-$max_tokens}" --probe "$data_dir/probe.json"
