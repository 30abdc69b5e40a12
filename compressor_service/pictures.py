"""Pictures that nobody vouches for, opened so that few bytes cannot make much work. Imports no torch."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from compressor_service.facts import BadPicture

MAX_REPEATS = 100

# Parts that cost Pillow so much, each time, that a few MiB of them are work for minutes. Ordinary pictures have few: a
# progressive JPEG some ten scans, and one more in each thumbnail. By how the files begin.
_REPEATED = {
    b"\xff\xd8": (
        b"\xff\xda\x00",  # a scan: each goes over the whole picture; noise has these bytes once in 16 MiB
        b"Exif\0\0",  # they are joined, and each time what came before is copied
    ),
    b"\x89PNG": (b"iCCP",),  # each is unpacked, to at most a megabyte
}


@contextmanager
def opened(picture: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open a picture of one of Pillow's formats, to be decoded within. Raises BadPicture, also for what fails there."""
    for start, parts in _REPEATED.items():
        if picture.startswith(start) and any(picture.count(part) > MAX_REPEATS for part in parts):
            raise BadPicture(
                f"the picture repeats a part more than {MAX_REPEATS} times: save it anew, without metadata"
            )
    try:
        with Image.open(io.BytesIO(picture), formats=formats) as found:
            yield found
    except BadPicture:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadPicture(f"the bytes are no whole {', '.join(formats)} picture") from error
