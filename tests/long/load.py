"""Traffic that goes on whatever becomes of the daemon, and knows what each answer must be."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from machine import Machine

import llmos
from llmos.errors import LlmosError
from llmosd.worker.drivers.simulated import text_of

#: Streams at once; together they keep all slots of the bystander busy.
STREAMS = 4
TOKENS = 20
#: Seconds that an answer may take, whatever is done to its worker.
ANSWER_S = 45


class Load:
    """Streams from a simulated model, again and again, each compared with the one right answer."""

    def __init__(self, runtime: Path, model: str) -> None:
        self.done = 0
        self.problems: list[str] = []
        self._model = model
        self._end = threading.Event()
        self._client = llmos.Client(str(runtime), patience=30)
        self._threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def _stream(self, number: int) -> None:
        prompt = f"stream {number}"
        right = text_of(prompt, TOKENS)
        while not self._end.is_set():
            try:
                pieces = self._client.run(self._model, prompt, stream=True, max_tokens=TOKENS, timeout=60)
                text = "".join(piece.text for piece in pieces)
            except LlmosError as error:
                self.problems.append(f"{type(error).__name__}: {error}")
                return
            if text != right:
                self.problems.append(f"{text!r} is not {right!r}")
            self.done += 1

    def stop(self) -> None:
        """Let the streams under way end, and fail if any was not right."""
        self._end.set()
        for thread in self._threads:
            thread.join(90)
        self._client.close()
        assert not self.problems, self.problems
        assert self.done >= STREAMS


class Traffic:
    """Streams that go on through anything, by the library and by the gateway. Failing with an error is allowed them;
    to be answered wrongly, or never, is not."""

    def __init__(self, machine: Machine, models: list[str]) -> None:
        self._machine = machine
        self._end = threading.Event()
        #: Streams that ended as they must, and those that failed, by the error.
        self.compared = 0
        self.failed: Counter[str] = Counter()
        self.problems: list[str] = []
        self._client = llmos.Client(str(machine.runtime), patience=30)
        ways: tuple[Callable[[str, str], Iterator[str]], ...] = (self._by_library, self._by_gateway)
        self._threads = [
            threading.Thread(target=self._go_on, args=(way, model, f"{model} {way.__name__} {number}"), daemon=True)
            for model in models
            for way in ways
            for number in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _go_on(self, way: Callable[[str, str], Iterator[str]], model: str, name: str) -> None:
        for count in itertools.count():
            if self._end.is_set():
                return
            prompt = f"{name} {count}"
            right = text_of(prompt, TOKENS)
            text, error = "", ""
            try:
                for piece in way(model, prompt):
                    text += piece
            except (LlmosError, HttpError, OSError, http.client.HTTPException) as failure:
                error = getattr(failure, "code", "") or type(failure).__name__
            if text != right if not error else not right.startswith(text):
                self.problems.append(f"{prompt}: {text!r} is not {right!r} ({error or 'complete'})")
            if error:
                self.failed[error] += 1
                self._end.wait(0.1)
            else:
                self.compared += 1

    def _by_library(self, model: str, prompt: str) -> Iterator[str]:
        for piece in self._client.run(model, prompt, stream=True, max_tokens=TOKENS, timeout=ANSWER_S):
            yield piece.text

    def _by_gateway(self, model: str, prompt: str) -> Iterator[str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._machine.http_port, timeout=ANSWER_S)
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "stream": True}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise HttpError(json.loads(answer.read())["error"]["code"] or str(answer.status))
            for line in answer:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if line.startswith(b"data: "):
                    event = json.loads(data)
                    if "error" in event:
                        raise HttpError(str(event["error"]["code"]))
                    yield "".join(choice["text"] for choice in event["choices"])
            raise HttpError("broken off")
        finally:
            connection.close()

    def stop(self) -> None:
        """Let the streams under way end; every one must, in time."""
        self._end.set()
        end = time.monotonic() + ANSWER_S * 2
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        alive = [thread.name for thread in self._threads if thread.is_alive()]
        self._client.close()
        assert not alive, f"{len(alive)} streams never end"
        assert not self.problems, "\n".join(self.problems[:20])

    def figures(self) -> str:
        failed = ", ".join(f"{error} {count}" for error, count in self.failed.most_common())
        return f"{self.compared} streams compared, failed with an error: {failed or 'none'}"


class HttpError(Exception):
    """The gateway said what went wrong."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = f"http {code}"
