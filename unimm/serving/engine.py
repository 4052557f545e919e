"""`Engine`: one thread owns the model; waiting requests of one kind run as one batch.

A batch begins with the request that has waited longest. Requests of its kind that arrived since, or that arrive within
`batch_wait`, join it up to a budget of tokens, which bounds the memory of the KV cache. Drawings are admitted between
batches, not between the tokens of a running one: all rows of a batch share its KV cache and positions.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch

from unimm.errors import UserError
from unimm.mllm.memory import cache_bytes_per_token
from unimm.serving.batches import Abandoned, run_drawings, run_reconstructions, run_texts
from unimm.serving.jobs import DrawRequest, Event, Failed, Finished, Job, ReconstructRequest, Request, TextRequest
from unimm.serving.settings import EngineSettings

logger = logging.getLogger(__name__)

_RUN: dict[type, Callable[[Any, Any, Any], None]] = {
    TextRequest: run_texts,
    DrawRequest: run_drawings,
    ReconstructRequest: run_reconstructions,
}
_RECENT = 8  # batches that the estimate of the waiting time averages


class Busy(Exception):
    """The queue is full; `retry_after` is the expected number of seconds until it is not."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The server is busy: try again in {retry_after} s.")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class Engine:
    """Run requests on a unified model, in batches, in a thread of its own.

    Args:
        model, processor: from `unimm.load`; nothing else may call the model while the engine is open.
        settings: sizes of queue and batches.
        on_batch: called with the kind of a batch ("text", "image" or "reconstruction"), its number of requests, and
            its seconds.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: EngineSettings | None = None,
        on_batch: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.settings = settings or EngineSettings()
        self.on_batch = on_batch
        self.budget = min(self.settings.batch_tokens, self.settings.batch_memory // cache_bytes_per_token(model))
        self._waiting: deque[Job[Request]] = deque()
        self._running: list[Job[Request]] = []
        self._change = threading.Condition()
        self._closing = False
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds per request
        self._thread = threading.Thread(target=self._work, name="unimm-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return the number of requests in the running batch for which somebody waits."""
        return sum(job.live for job in self._running)

    @property
    def alive(self) -> bool:
        """Return whether the engine takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def context(self) -> int:
        """Return the number of tokens that the model reads."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def can_draw(self) -> bool:
        """Return whether the model draws images, and its context has room for one."""
        tokens = getattr(self.model, "num_image_tokens", None)
        return tokens is not None and tokens + 1 < self.context

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Job[Request]:
        """Put a request into the queue; `deliver` receives its events in the engine's thread and must not block.

        Raises:
            Busy: if the queue, or the memory for the images of waiting requests, is full.
            Closed: if the engine is shutting down.
            UserError: if the request alone is larger than a batch.
        """
        if _size([request]) > self.budget:
            raise UserError(
                f"This needs {_size([request])} tokens at once and the server takes {self.budget}: ask for fewer "
                "images or answers, or for shorter ones."
            )
        job = Job(request, deliver)
        with self._change:
            if self._closing:
                raise Closed
            held = sum(each.request.pixels for each in (*self._waiting, *self._running))
            if len(self._waiting) >= self.settings.queue_size or held + request.pixels > self.settings.queue_pixels:
                raise Busy(self._retry_after())
            self._waiting.append(job)
            self._change.notify_all()
        return job

    def cancel(self, job: Job[Request]) -> None:
        """Free the place of a job for which nobody waits any more; a batch without any other job ends."""
        with self._change:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def events(self, request: Request) -> Iterator[Event]:
        """Run a request and yield its events, `Finished` last; closing the iterator cancels the request.

        Raises:
            Exception: see `submit`, and what the request failed with.
        """
        events: SimpleQueue[Event] = SimpleQueue()
        job = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self.cancel(job)

    def run(self, request: Request) -> list[Any]:
        """Run a request and return its results; raises as `events` does."""
        *_, last = self.events(request)
        assert isinstance(last, Finished)
        return last.results

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, finish what is running and waiting, and end the thread.

        Args:
            timeout: seconds after which the rest is given up; None waits for all of it.
        """
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._change:
                for job in (*self._waiting, *self._running):
                    job.send(Failed(Closed()))
                self._waiting.clear()
            self._thread.join()

    def _retry_after(self) -> int:
        """Return the seconds that the queue is expected to take, from the recent batches; 1 to 60."""
        each = sum(self._recent) / len(self._recent) if self._recent else 0.1
        return min(max(math.ceil(each * len(self._waiting)), 1), 60)

    def _work(self) -> None:
        """Run batches until the engine is closed and the queue is empty."""
        with torch.inference_mode():
            while batch := self._next_batch():
                start = time.monotonic()
                self._run(batch)
                seconds = time.monotonic() - start
                if self.on_batch is not None:
                    self.on_batch(batch[0].request.kind, len(batch), seconds)
                with self._change:
                    self._running = []
                    self._recent.append(seconds / len(batch))

    def _next_batch(self) -> list[Job[Request]]:
        """Wait for a batch; return an empty one once the engine is closed and the queue is empty."""
        with self._change:
            while not self._waiting:
                if self._closing:
                    return []
                self._change.wait()
            until = self._waiting[0].arrived + self.settings.batch_wait
            while self._waiting and (left := until - time.monotonic()) > 0 and not self._closing:
                if not self._change.wait(left):
                    break
            batch = self._admitted()
            for job in batch:
                self._waiting.remove(job)
            self._running = batch
            return batch or self._next_batch()  # the only one has been cancelled meanwhile

    def _admitted(self) -> list[Job[Request]]:
        """Return the first waiting job and those that fit into a batch with it."""
        batch: list[Job[Request]] = []
        identities = set()
        for job in self._waiting:
            request = job.request
            if batch and request.batch_key != batch[0].request.batch_key:
                continue
            if request.identity is not None and request.identity in identities:
                continue
            if _size([*(each.request for each in batch), request]) > self.budget:
                break  # later ones must not overtake it again and again
            batch.append(job)
            identities.add(request.identity)
        return batch

    def _run(self, batch: list[Job[Request]]) -> None:
        """Run a batch. If it fails, run each of its jobs alone, so that a job fails only by itself."""
        live = [job for job in batch if job.live]
        if not live:
            return
        try:
            _RUN[type(live[0].request)](self.model, self.processor, live)
        except Abandoned:
            return
        except Exception as error:  # whatever it is, the other requests must not suffer
            left = [job for job in live if job.live]
            if not isinstance(error, UserError):
                logger.exception("a batch of %d failed", len(live))
            for job in left:
                if job.begun or len(live) == 1:
                    job.send(Failed(error))
                else:
                    self._run([job])


def _size(requests: list[Request]) -> int:
    """Return the tokens of a batch: all rows are as long as the longest."""
    return sum(request.rows for request in requests) * max(request.row_tokens for request in requests)
