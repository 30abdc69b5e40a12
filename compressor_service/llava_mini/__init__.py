"""LLaVA-Mini: the whole network, without Ray and without input or output but the checkpoint.

Letters of tensor shapes: B batch, F frames of any sources, T frames of one timeline, N patches of a picture,
V vision width, D model width, C2 tokens of a frame, L rows of text, S rows of any kind, P width of the search space.
"""

from compressor_service.llava_mini.checkpoint import BadCheckpoint
from compressor_service.llava_mini.config import LlavaMiniConfig
from compressor_service.llava_mini.language import ContextTooLong, Prefix, Sampling
from compressor_service.llava_mini.model import LlavaMini, NotLoaded

__all__ = ["BadCheckpoint", "ContextTooLong", "LlavaMini", "LlavaMiniConfig", "NotLoaded", "Prefix", "Sampling"]
