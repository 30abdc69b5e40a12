"""How well a model answers and finds: offline, and on request through the whole service; told as a table or as JSON."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from compressor_service.training.evaluate import Evaluation, Reader, Report, SearchScore
from compressor_service.training.exam import Group
from compressor_service.training.score import Tally
from deploy import display
from deploy.served_evaluation import Served, ServiceReport
from qa_service.selection import stratified
from qa_service.settings import QASettings

LONG_SHARE = 8  # one long clip for so many scenes: it lasts as long as ten others


class FullReport(Report):
    """What was found out, offline and through the service."""

    service: ServiceReport | None = None


class Wanted(BaseModel):
    """What is to be evaluated."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    seed: int
    scenes: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    long: bool
    through_service: bool
    search_seconds: int
    show_wrong: int


def chosen_frames(frames: int) -> NDArray[np.int64]:
    """Return which of so many frames the service's text looks at: all of a few, else a stratified sample."""
    return stratified(np.arange(frames), QASettings().fusion_frames)


def evaluate(wanted: Wanted) -> FullReport:
    """Evaluate a model on the split that nothing was learned from. Raises BadCheckpoint, and what the service does."""
    began = time.perf_counter()
    reader = Reader.load(wanted.checkpoint, chosen_frames, dtype=wanted.dtype, device=wanted.device)
    evaluation = Evaluation(reader, split="test", seed=wanted.seed)
    counts: dict[Group, int] = {"pictures": wanted.scenes, "clips": wanted.scenes}
    if wanted.long:
        counts["long"] = -(-wanted.scenes // LONG_SHARE)
    with _progress() as progress:
        for group, count in counts.items():
            task = progress.add_task(group, total=count)
            evaluation.examine(group, count, partial(progress.advance, task))
        task = progress.add_task("search", total=None)
        evaluation.look_for_search(wanted.search_seconds)
        progress.update(task, total=1, completed=1)
        report = evaluation.report(wanted.checkpoint, show_wrong=wanted.show_wrong)
        service = None
        if wanted.through_service:
            with Served.start(wanted.checkpoint, dtype=wanted.dtype, device=wanted.device) as served:
                service = served.evaluate(evaluation, progress)
    seconds = {**report.seconds, "all": round(time.perf_counter() - began, 3)}
    return FullReport(**{**dict(report), "seconds": seconds}, service=service)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show how far it is on standard error, which leaves standard output to the result."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def print_report(report: FullReport) -> None:
    """Print a report for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("questions")
    for name in ("n", "right", "95 % from", "to", "blind"):
        table.add_column(name, justify="right")
    for group, scored in report.groups.items():
        table.add_row(Text(f"{group}, {scored.all.score.scenes} scenes", style="bold"), *_cells(scored.all))
        for name, tally in (("yes or no", scored.yes_no), ("others", scored.other)):
            if tally is not None:
                table.add_row(f"  {name}", *_cells(tally))
        for family, tally in scored.families.items():
            table.add_row(f"    {family}", *_cells(tally))
    table.add_row(Text("pictures and clips", style="bold"), *_cells(report.all))
    display.console().print(table)
    print("blind: the most usual answer to each wording, without looking")
    if report.search is not None:
        print(f"search: {_told(report.search)}")
    if report.service is not None:
        _print_service(report.service)
    for one in report.wrong:
        print(display.printable(f"wrong, {one.scene} {one.family}: {one.question} {one.right!r}, not {one.said!r}"))
    if report.untrained:
        print("NOTE: this model has seeded, untrained weights: its answers carry NO meaning.")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    print(f"{report.checkpoint} ({report.fingerprint}), seed {report.seed}, {report.dtype} on {report.device}: {spent}")


def _print_service(service: ServiceReport) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("through the service", "scenes", "n", "right", "offline", "difference", "same answer"):
        table.add_column(name, justify="left" if name.startswith("through") else "right")
    for name, one in service.sources.items():
        score, difference = one.service, f"{one.difference:+.1%}"
        cells = (str(score.scenes), str(score.n), f"{score.accuracy:.1%}", f"{one.offline.accuracy:.1%}", difference)
        table.add_row(name, *cells, f"{one.same_answers} of {score.n}")
    display.console().print(table)
    if service.search is not None:
        print(f"search through the service: {_told(service.search.service)}")
        print(f"the same offline:           {_told(service.search.offline)}")
    for note in service.notes:
        print(f"note: {note}")


def _told(search: SearchScore) -> str:
    recall = search.recall
    return (
        f"of {recall.n} things {recall.accuracy:.1%} are in one of the first 5 seconds found "
        f"({recall.low:.1%} to {recall.high:.1%}, by chance {search.chance:.1%}) of {search.seconds} s"
    )


def _cells(tally: Tally) -> Sequence[str]:
    score = tally.score
    return str(score.n), f"{score.accuracy:.1%}", f"{score.low:.1%}", f"{score.high:.1%}", f"{tally.blind:.1%}"
