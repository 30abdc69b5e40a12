"""Curves of a training: for each stage a picture with one panel for each loss and accuracy, by step."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from compressor_service.training.journal import Line

HOW_TO_DRAW = "no curves are drawn without matplotlib: pip install 'tokenline[train]'"
_COLUMNS = 4
_PANEL_INCHES = (3.6, 2.4)


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw_curves(lines: Iterable[Line], folder: Path) -> list[Path]:
    """Draw `folder`/STAGE.png of every stage that told something."""
    by_stage: dict[str, list[Line]] = {}
    for line in lines:
        by_stage.setdefault(line.stage, []).append(line)
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(stage, told, folder / f"{stage}.png") for stage, told in by_stage.items()]


def _draw(stage: str, lines: Sequence[Line], path: Path) -> Path:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for line in lines for name in line.values))
    columns = min(_COLUMNS, max(1, len(names)))
    rows = -(-len(names) // columns) or 1
    size_inches = columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1]
    figure = Figure(figsize=size_inches, layout="constrained")
    figure.suptitle(f"{stage}, {lines[-1].step} steps, {lines[-1].seconds / 3600:.2f} h since the beginning")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for name, panel in zip(names, panels, strict=False):
        points = [(line.step, line.values[name]) for line in lines if name in line.values]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize="medium")
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=100)
    return path
