"""Batches in order, drawn ahead in other processes while this one learns."""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

BatchT = TypeVar("BatchT")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DrawFailed(RuntimeError):
    """A batch could not be drawn in another process."""


def batches(draw: Callable[[int], BatchT], numbers: range, *, workers: int) -> Generator[BatchT]:
    """Draw the batches of `numbers`; without workers each is drawn when it is asked for.

    Workers take turns, and each is one batch ahead. They end with the generator, and with this process.
    """
    if not workers:
        yield from map(draw, numbers)
        return
    with _drawn(pickle.dumps(draw), [numbers[first::workers] for first in range(workers)]) as pipes:
        for turn, number in enumerate(numbers):
            batch: BatchT = _receive(pipes[turn % workers], number)
            yield batch


@contextmanager
def _drawn(draw: bytes, shares: Sequence[range]) -> Iterator[list[Connection]]:
    """Start a process for each share of the numbers; yields where their batches come out."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for numbers in shares:
            ours, theirs = context.Pipe(duplex=False)
            stack.enter_context(ours)
            with theirs:
                worker = context.Process(target=_draw_share, args=(draw, numbers, theirs), daemon=True)
                with _signals_held():
                    worker.start()
            stack.callback(worker.join)
            stack.callback(worker.kill)
            pipes.append(ours)
        yield pipes


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let processes that are started here inherit deafness for what ends a training.

    Ctrl-C and service managers signal every process, and the step under way may still need a batch. The tracker is
    started first because its own start lets the signals through again.
    """
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _draw_share(pickled: bytes, numbers: range, pipe: Connection) -> None:
    torch.set_num_threads(1)  # the cores are for learning
    # Whole bytes, not objects: torch would put tensors into /dev/shm, of which a container has 64 MB.
    try:
        draw: Callable[[int], object] = pickle.loads(pickled)
        for number in numbers:
            pipe.send_bytes(pickle.dumps((draw(number), None)))  # waits until the one before is taken
    except BrokenPipeError:  # nobody is there to learn from it
        return
    except Exception as error:
        told = "".join(traceback.format_exception_only(error)).strip(), traceback.format_exc()
        pipe.send_bytes(pickle.dumps((None, told)))


def _receive(pipe: Connection, number: int) -> Any:
    try:
        batch, failure = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError) as error:
        raise DrawFailed(f"batch {number}: the process that draws it was killed, perhaps for want of memory") from error
    if failure is not None:
        message, trace = failure
        failed = DrawFailed(f"batch {number}: {message}")
        failed.add_note(trace)
        raise failed
    return batch
