"""A real engine for tests: OpenAI's API over HTTP, from the standard library alone. What it says is words it counts.

    openai_like.py --port N [--rate TOKENS_A_SECOND] [--key KEY] [--served NAME] [--no-usage] [--print-bytes N]
                   [--single]

With --single it does one thing at a time: while it answers a request, it answers nothing else.

Besides the API it tells what it saw: /seen has the requests, /active how many are being answered now. The prompt
"teapot" is refused with an error body of its own; "drop" breaks the connection off after three tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")


class Engine(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    options: argparse.Namespace
    seen: list[dict[str, Any]]
    active = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        how = HTTPServer if self.options.single else ThreadingHTTPServer
        how.process_request(self, request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def log_message(self, *args: Any) -> None:
        """The tests read the log for other things."""

    def do_GET(self) -> None:
        answers: dict[str, Any] = {
            "/health": {"status": "ok"},
            "/seen": self.server.seen,
            "/active": {"active": self.server.active},
        }
        found = answers.get(self.path)
        self._json(200 if found is not None else 404, found if found is not None else {"error": "no such path"})

    def do_POST(self) -> None:
        options = self.server.options
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        self.server.seen.append(
            {"path": self.path, "body": body, "headers": {k.lower(): v for k, v in self.headers.items()}}
        )
        if options.key and self.headers.get("authorization") != f"Bearer {options.key}":
            return self._error(401, "wrong key", "invalid_api_key")
        if options.served and body.get("model") != options.served:
            return self._error(404, f"no model {body.get('model')!r}", "model_not_found")
        if self.path == "/v1/embeddings":
            return self._json(200, {"object": "list", "model": body["model"], "data": [
                {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}]})  # fmt: skip
        if self.path not in COMPLETIONS:
            return self._error(404, f"no {self.path}", "not_found")
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        if prompt == "teapot":
            return self._error(418, "I am a teapot", "teapot")
        self.server.active += 1
        try:
            self._complete(body, prompt, int(body.get("max_tokens", 8)))
        except (BrokenPipeError, ConnectionResetError):
            pass  # its reader has gone, so this is over
        finally:
            self.server.active -= 1

    def _complete(self, body: dict[str, Any], prompt: str, wanted: int) -> None:
        options = self.server.options
        counts = {"prompt_tokens": len(prompt.split()), "completion_tokens": wanted}
        counts["total_tokens"] = sum(counts.values())
        usage = {} if options.no_usage else {"usage": counts}
        base = {"id": "engine-id", "created": 1, "model": body["model"], "object": "text_completion"}
        if not body.get("stream"):
            time.sleep(wanted / options.rate)
            text = "".join(f" w{index}" for index in range(wanted))
            choice = {"index": 0, "text": text, "finish_reason": "stop"}
            if "messages" in body:
                choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return self._json(200, base | {"choices": [choice]} | usage)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for index in range(wanted):
            time.sleep(1 / options.rate)
            last = "stop" if index + 1 == wanted else None
            inner = {"delta": {"content": f" w{index}"}} if "messages" in body else {"text": f" w{index}"}
            self._event(base | {"choices": [{"index": 0, "finish_reason": last} | inner]})
            if prompt == "drop" and index == 2:
                return None
        if usage and (body.get("stream_options") or {}).get("include_usage"):
            self._event(base | {"choices": []} | usage)
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def _error(self, status: int, message: str, code: str) -> None:
        self._json(status, {"error": {"message": message, "code": code, "from": "the engine itself"}})

    def _json(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def print_bytes(count: int) -> None:
    block = b"x" * 99 + b"\n"
    block *= 1000
    for _ in range(count // len(block)):
        os.write(1, block)
    os.write(1, b"printed it all\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--served", default="")
    parser.add_argument("--no-usage", action="store_true")
    parser.add_argument("--print-bytes", type=int, default=0)
    parser.add_argument("--single", action="store_true")
    options = parser.parse_args()
    engine = Engine(("127.0.0.1", options.port), Handler)
    engine.options, engine.seen = options, []
    print(f"serves on {options.port}", flush=True)
    if options.print_bytes:
        threading.Thread(target=print_bytes, args=(options.print_bytes,), daemon=True).start()
    engine.serve_forever()


if __name__ == "__main__":
    main()
