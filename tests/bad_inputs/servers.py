"""A server of rewards that answers in a few wrong ways, one a path."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS: dict[str, bytes] = {
    "/html": b"<html>no scores here</html>",
    "/escape": b"\x1b[31mred\x07",
}
"""Path -> a whole answer that holds no scores."""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        # Whoever follows a redirection with an empty question gets scores that mean nothing.
        self._answer(json.dumps({"scores": [0.0, 1.0, 0.0, 1.0]}).encode())

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.startswith("/moved"):
            self.send_response(int(self.path.removeprefix("/moved")))
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        elif self.path == "/endless":
            self._send_without_end()
        elif self.path in ANSWERS:
            self._answer(ANSWERS[self.path])
        else:
            count = len(json.loads(asked)["completions"])
            self._answer(json.dumps({"scores": [float(n % 2) for n in range(count)]}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_without_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has hung up
            for _ in range(4000):
                self.wfile.write(b" " * (1 << 20))


def serve() -> str:
    """Start the server; it ends with the process.

    Returns:
        Its address.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"
