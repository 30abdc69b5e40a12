"""The language model on a thread of its own: one answer at a time, and what it keeps of timelines it has read."""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_service.llava_mini import LlavaMini, Prefix, Sampling


class PrefixCache:
    """The prefixes used last, up to a number of bytes. Prefixes are immutable and may be shared by answers."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[Hashable, tuple[Prefix, frozenset[str]]] = OrderedDict()
        self._bytes = 0
        self._turn = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether anything can be kept at all."""
        return self._max_bytes > 0

    def get(self, key: Hashable) -> Prefix | None:
        """Return the prefix of `key` if it is still held."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            found = self._held.get(key)
            return None if found is None else found[0]

    @property
    def turn(self) -> int:
        """A number that changes whenever something is forgotten."""
        with self._lock:
            return self._turn

    def put(self, key: Hashable, prefix: Prefix, sources: frozenset[str], turn: int) -> None:
        """Hold a prefix of frames of `sources`, and let go of those used longest ago.

        One that is larger than everything is not held, nor one whose frames were read before the last erasure: `turn`
        is that of then.
        """
        with self._lock:
            if key in self._held or prefix.nbytes > self._max_bytes or turn != self._turn:
                return
            self._held[key] = prefix, sources
            self._bytes += prefix.nbytes
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._held)))

    def forget(self, source_id: str) -> None:
        """Let go of every prefix that holds frames of a source."""
        with self._lock:
            self._turn += 1
            for key in [key for key, (_, sources) in self._held.items() if source_id in sources]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        prefix, _ = self._held.pop(key)
        self._bytes -= prefix.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What the model is to read and how it is to write.

    `head` is the prompt up to and with the frames: rows (S, D), or the prefix that an earlier answer left. `tail` are
    the rows (L', D) behind it. `key` names the head: the same key, the same rows. `sources`
    are those of the frames, `turn` is that of the prefix cache before they were read.
    """

    key: Hashable
    sources: frozenset[str]
    turn: int
    head: Tensor | Prefix
    tail: Tensor
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Collection[int]


class ModelThread:
    """Runs generations one after the other, in the order they came."""

    def __init__(self, model: LlavaMini, prefixes: PrefixCache) -> None:
        self._model = model
        self._prefixes = prefixes
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="language-model")

    async def stream(self, generation: Generation) -> AsyncGenerator[int, None]:
        """Yield the ids of the answer as they are made. Closing the generator stops the thread at its next id."""
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[int | None] = asyncio.Queue()
        gone = threading.Event()

        def hand_over(one: int | None) -> None:
            loop.call_soon_threadsafe(made.put_nowait, one)

        work = loop.run_in_executor(self._executor, self._generate, generation, hand_over, gone)
        try:
            while (one := await made.get()) is not None:
                yield one
            await work
        finally:
            gone.set()
            work.cancel()  # for one that has not begun

    def close(self) -> None:
        """End the thread after the generation that is under way."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    @torch.inference_mode()
    def _generate(self, generation: Generation, hand_over: Callable[[int | None], None], gone: threading.Event) -> None:
        try:
            if gone.is_set():
                return
            prefix, rows = self._begin(generation)
            ids = self._model.stream(
                rows,
                max_new_tokens=generation.max_new_tokens,
                sampling=generation.sampling,
                prefix=prefix,
                stop_ids=generation.stop_ids,
            )
            for one in ids:
                if gone.is_set():
                    return
                hand_over(one)
        finally:
            hand_over(None)

    def _begin(self, generation: Generation) -> tuple[Prefix | None, Tensor]:
        """Return the prefix to start from, and the rows behind it."""
        if isinstance(generation.head, Prefix):
            return generation.head, generation.tail
        if not self._prefixes.enabled:
            return None, torch.cat((generation.head, generation.tail))
        prefix = self._prefixes.get(generation.key)  # an answer that was under way may have left it meanwhile
        if prefix is None:
            prefix = self._model.prefill(generation.head)
            self._prefixes.put(generation.key, prefix, generation.sources, generation.turn)
        return prefix, generation.tail
