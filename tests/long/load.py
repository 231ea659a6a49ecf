"""Traffic that goes on whatever becomes of the daemon, and knows what each answer must be."""

from __future__ import annotations

import threading
from pathlib import Path

import llmos
from llmos.errors import LlmosError
from llmosd.worker.drivers.simulated import text_of

#: Streams at once; together they keep all slots of the bystander busy.
STREAMS = 4
TOKENS = 20


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
