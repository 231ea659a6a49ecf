"""HTTP from outside: curl as the real tool, for the tests of the gateway."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from machine import Machine, wait_for

import llmos
from llmos.types import Request

#: Written by curl after the body.
_STATUS = "\n%{http_code}"


class Answer(NamedTuple):
    status: int
    body: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's shape; every other shape fails here."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["message"])


def curl(machine: Machine, path: str, *args: str, stdin: str = "", timeout_s: float = 20) -> Answer:
    """One request; fails when there is no answer."""
    command = ["curl", "-sS", "-i", "-m", str(timeout_s), "-w", _STATUS, *args, machine.url + path]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s + 5, check=False)
    assert done.returncode == 0, done.stderr
    text, _, status = done.stdout.rpartition("\n")
    head, _, body = text.replace("\r\n", "\n").partition("\n\n")
    while head.startswith("HTTP/1.1 100"):
        head, _, body = body.partition("\n\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.splitlines()[1:])}
    return Answer(int(status), body, headers)


def post(machine: Machine, path: str, body: object, *args: str) -> Answer:
    text = body if isinstance(body, str) else json.dumps(body)
    return curl(machine, path, "--data-binary", "@-", *args, stdin=text)


@contextlib.contextmanager
def asking(machine: Machine, model: str, *, tokens: int = 1000, args: tuple[str, ...] = ()) -> Iterator[Any]:
    """curl -N, streaming from a model in the background; it goes away when this ends."""
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": tokens, "stream": True})
    command = ["curl", "-sS", "-N", *args, "-d", body, f"{machine.url}/v1/completions"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_requests(machine: Machine, model: str, count: int, state: str = "") -> tuple[Request, ...]:
    """Wait until a model has so many requests in flight, as `llmos ps -T` shows them; in `state`, if one is given."""
    with llmos.Client(str(machine.runtime)) as client:

        def look() -> tuple[bool, tuple[Request, ...]] | None:
            found = tuple(r for r in client.requests(model) if not state or r.state == state)
            return (True, found) if len(found) == count else None

        return wait_for(f"{count} {state} requests for {model}", look)[1]  # type: ignore[index]
