"""The review page as a user starts it: a real process on a real loopback port."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Server:
    """A running review: its process, port, and the token of each reviewer."""

    process: subprocess.Popen
    port: int
    tokens: dict[str, str]

    def address(self, reviewer: str) -> str:
        return f"http://127.0.0.1:{self.port}/{self.tokens[reviewer]}/"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body; headers given here replace the usual ones, "" leaves one out."""
        usual = {"Host": f"127.0.0.1:{self.port}"}
        if method == "POST":
            usual |= {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        sent = {name: value for name, value in {**usual, **headers}.items() if value}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {**sent, "Content-Length": str(len(data or b""))}.items():
            connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        connection.close()
        return found

    def get(self, reviewer: str, path: str) -> Any:
        status, _, body = self.request("GET", f"/{self.tokens[reviewer]}/{path}")
        assert status == 200, body
        return json.loads(body)

    def decide(self, reviewer: str, position: int, verdict: str, comment: str = "", request: str = "") -> dict:
        body = {"position": position, "verdict": verdict, "comment": comment, "request": request or os.urandom(8).hex()}
        status, _, answer = self.request("POST", f"/{self.tokens[reviewer]}/decide", body)
        assert status == 200, answer
        return json.loads(answer)["decision"]


@contextlib.contextmanager
def serving(dataset: Path, *flags: str) -> Iterator[Server]:
    """Starts `python -m ivr_jax.review` on a free port; kills it in the end."""
    command = [sys.executable, "-m", "ivr_jax.review", str(dataset), "--port=0", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        # Where the tests run in the background of a shell, an interrupt is ignored, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        tokens, port, printed = {}, 0, []
        for line in process.stdout:
            printed.append(line)
            match = re.match(r"  (.+): http://127\.0\.0\.1:(\d+)/([\w-]+)/$", line)
            if match:
                tokens[match[1]], port = match[3], int(match[2])
            if len(tokens) == 2:
                break
        assert len(tokens) == 2, "".join(printed)
        yield Server(process, port, tokens)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
