#!/usr/bin/env bash
# A tour with a real model: load, stream, look, kill, see it come back, ask over HTTP, stop. `make demo` runs it.
# Everything it makes is below .demo and one directory in /tmp; it leaves no process and no socket.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=gemma3-270m
root=$PWD/.demo
# Sockets' paths are short, wherever this checkout is.
runtime=$(mktemp -d /tmp/llmosd-demo.XXXXXX)
export LLMOS_HOST=$runtime
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
daemon=

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
if [ ! -t 1 ] || [ -n "${NO_COLOR:-}" ]; then say() { printf '\n==> %s\n' "$*"; }; fi
show() {
    printf '$ %s\n' "$*"
    "$@"
}
clean_up() {
    status=$?
    if [ -n "$daemon" ]; then
        kill -TERM "$daemon" 2>/dev/null && wait "$daemon" || true
    fi
    if [ $status -ne 0 ]; then
        echo "the demo failed; the daemon's log ends:" >&2
        tail -n 30 "$root/daemon.log" >&2 || true
    fi
    rm -rf "$runtime"
    exit $status
}
trap clean_up EXIT

say "Preparing the model (once)"
python examples/prepare.py "$root"
printf '[gateway]\nlisten = "127.0.0.1:%s"\n' "$port" >"$root/etc/llmosd.toml"

say "Starting the daemon"
llmosd --root "$root" --runtime-dir "$runtime" >"$root/daemon.log" 2>&1 &
daemon=$!
for _ in $(seq 100); do llmos status >/dev/null 2>&1 && break || sleep 0.1; done
show llmos status

say "Loading $model: a real engine, llama.cpp, in a process of its own"
show llmos start $model

say "Streaming a completion"
show llmos run $model "The capital of France is" --max-tokens 24 --temperature 0

say "Two requests run; what the system sees of them"
llmos run $model "Once upon a time" --max-tokens 200 >/dev/null &
first=$!
llmos run $model "The quick brown fox" --max-tokens 200 >/dev/null &
second=$!
until [ "$(llmos ps -T -o json | python -c 'import json, sys; print(sum(r["state"] == "running" for r in json.load(sys.stdin)))')" = 2 ]; do
    kill -0 $first 2>/dev/null || break
done
show llmos ps
show llmos ps -T
show llmos limits $model
wait $first $second

say "Killing the worker, as hard as can be"
before=$(llmos ps -o json | python -c 'import json, sys; print(next(w["pid"] for w in json.load(sys.stdin) if w["model"] == "gemma3-270m"))')
show llmos kill -s KILL $model
say "It comes back by itself, and answers: this request waited for it"
show llmos run $model "The capital of Italy is" --max-tokens 24 --temperature 0
show llmos ps $model
after=$(llmos ps -o json | python -c 'import json, sys; print(next(w["pid"] for w in json.load(sys.stdin) if w["model"] == "gemma3-270m"))')
[ "$before" != "$after" ] || { echo "the worker was not killed" >&2; exit 1; }

say "Once more through OpenAI's API"
show curl -sS --fail-with-body "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "gemma3-270m", "prompt": "The capital of Spain is", "max_tokens": 12, "temperature": 0}'
echo

say "Stopping"
kill -TERM $daemon
wait $daemon
daemon=
# Every process of a worker has its daemon's mark in its environment.
mark=LLMOSD_GROUP=llmosd-$(printf %s "$runtime" | sha256sum | cut -c 1-12)
processes=$(grep -lsa "$mark" /proc/[0-9]*/environ | wc -l || true)
sockets=$(find "$runtime" -type s | wc -l)
echo "processes left: $processes, sockets left: $sockets"
[ "$processes" = 0 ] && [ "$sockets" = 0 ]
