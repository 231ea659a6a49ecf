"""A command for tests that serves GET, with the status that a file says: ``asked.py PORT FILE``.

Without the file it answers 503. "302" is a redirect to a path that answers 200; "drip" never ends its answer.
"""

from __future__ import annotations

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Silent: what it prints counts as progress."""

    def do_GET(self) -> None:
        says = Path(sys.argv[2])
        status = says.read_text().strip() if says.exists() else "503"
        if self.path == "/elsewhere":
            status = "200"
        self.send_response(int(status) if status.isdigit() else 200)
        self.send_header("location", "/elsewhere")
        self.end_headers()
        while status == "drip":
            self.wfile.write(b"x" * 1000)
            time.sleep(0.01)


print("serves", flush=True)
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.handle_error = lambda *args: None  # type: ignore[method-assign]  # whoever asked has gone
server.serve_forever()
