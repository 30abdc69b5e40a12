"""The names of a timeline's keys in Redis. All of one source lie in one slot of a cluster, by their hash tag."""

from collections.abc import Sequence
from dataclasses import dataclass

PARTS = ("t", "p", "m", "v")  # of a block: tokens, presence bits, capture times, search vectors

# Lua: a first write that changes nothing, and that Redis allows when it has no memory left. Behind it a script may
# write what it likes: so do those that make room, and those that say who may.
EVEN_WHEN_FULL = "redis.call('HDEL', KEYS[1], '')"

LOST_SOURCES = "lost"  # set of sources of which somebody met files that Redis has lost sight of

SEALED_MARK = "sealed"  # fields of marks beside those of hours
BLOCK_MARK = "b"  # with the number of the block behind it

# Lua: a mark that never was there before, for what has changed. Numbers that count would begin anew after a loss.
NEW_MARK = """
local time = redis.call('TIME')
local mark = time[1] .. '.' .. time[2]
"""


def formats_key(source_id: str) -> str:
    """Hash of the formats in which tokens of the source are kept, by fingerprint."""
    return f"tl:{{{source_id}}}:formats"


def erased_key(source_id: str) -> str:
    """A mark that every erasure of the source leaves, for a while."""
    return f"tl:{{{source_id}}}:erased"


@dataclass(frozen=True, slots=True)
class KeyframeKeys:
    """The keys of one source's keyframes; those of its packs are the same as those of a timeline's sealed hours."""

    source_id: str

    @property
    def changes(self) -> str:
        return f"kf:{{{self.source_id}}}:changes"

    @property
    def hours(self) -> str:
        return f"kf:{{{self.source_id}}}:hours"

    @property
    def sealed(self) -> str:
        return f"kf:{{{self.source_id}}}:packs"

    @property
    def totals(self) -> str:
        return f"kf:{{{self.source_id}}}:totals"

    @property
    def disowned(self) -> str:
        return f"kf:{{{self.source_id}}}:disowned"

    @property
    def loose(self) -> str:
        """Hash of what lies outside of packs, by hour: its bytes, and from which slot on it was left."""
        return f"kf:{{{self.source_id}}}:loose"


@dataclass(frozen=True, slots=True)
class TimelineKeys:
    """The keys of one source's tokens of one model."""

    source_id: str
    fingerprint: str

    @property
    def _root(self) -> str:
        return f"tl:{{{self.source_id}}}:{self.fingerprint}"

    @property
    def blocks(self) -> str:
        """Sorted set of the blocks that hold a frame: nothing has to be searched for with SCAN."""
        return f"{self._root}:blocks"

    @property
    def frames(self) -> str:
        """Number of frames that are kept, hot or sealed."""
        return f"{self._root}:frames"

    @property
    def changes(self) -> str:
        """Hash of marks by hour, and by block with a `b` before its number, until the hour is sealed.

        Every write and erasure of a hot block leaves new ones. Every change of which hours are sealed, and by what,
        leaves one under SEALED_MARK.
        """
        return f"{self._root}:changes"

    @property
    def hours(self) -> str:
        """Sorted set of the hours that are sealed."""
        return f"{self._root}:hours"

    @property
    def sealed(self) -> str:
        """Hash of the manifests of sealed hours, by hour."""
        return f"{self._root}:sealed"

    @property
    def totals(self) -> str:
        """Hash of what the manifests of sealed hours add up to: `frames` and `size`."""
        return f"{self._root}:totals"

    @property
    def disowned(self) -> str:
        """Set of files that are being removed, and must not count any more."""
        return f"{self._root}:disowned"

    def part(self, part: str, block: int) -> str:
        return f"{self._root}:{part}:{block}"

    def presence(self, block: int) -> str:
        return self.part("p", block)

    def of_blocks(self, blocks: Sequence[int]) -> list[str]:
        return [self.part(part, block) for block in blocks for part in PARTS]
