#!/usr/bin/env bash
# A daemon in the foreground with Gemma 3 270M, for exploring: `make run`. Ctrl-C ends it and its workers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python examples/prepare.py .demo
# The sockets go where `llmos` looks for them by itself.
if [ "$(id -u)" = 0 ]; then runtime=/run/llmosd; else runtime=${XDG_RUNTIME_DIR:-/tmp/llmosd-$(id -u)}; fi
[ -z "${XDG_RUNTIME_DIR:-}" ] || [ "$(id -u)" = 0 ] || runtime=$runtime/llmosd
cat <<TEXT
==> In another terminal:  . .venv/bin/activate
      llmos ps -a
      llmos run gemma3-270m "The capital of France is"
      curl http://127.0.0.1:8484/v1/models
    Ctrl-C here ends it.
TEXT
exec llmosd --root .demo --runtime-dir "$runtime" "$@"
