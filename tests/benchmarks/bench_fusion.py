"""How far text fused with K frames of a range is from text fused with all of them.

    python -m tests.benchmarks.bench_fusion [--frames 600]

The frames are the pictures of three real scenes, one after the other; the K of them are those that the answerer takes.
An error is the Euclidean length of what the two texts differ by; `relative_error` is that over the length of the exact
text, and the ratio sets it against the error of text that saw no frame at all.
"""

import argparse
import json
import tempfile

import numpy as np
import torch
from numpy.typing import NDArray

from compressor_service.llava_mini import LlavaMini
from compressor_service.llava_mini.prompt import Prompt
from compressor_service.preprocess import pixels
from qa_service.selection import stratified
from tests.benchmarks.film import film
from tests.untrained import write_untrained_checkpoint

SAMPLES = (1, 2, 4, 8, 16, 32, 64)
QUESTIONS = (
    "what is there in the picture?",
    "when did the white car leave, and who was standing beside the gate before?",
    "how many people are there?",
)


def errors(model: LlavaMini, ids: torch.Tensor, pictures: torch.Tensor) -> list[tuple[float, float]]:
    """Return for each K the error over the length of the exact text, and over the error of text that saw no frame."""
    fused: NDArray[np.float32] = model.fuse_text(ids, pictures).float().numpy()
    exact = fused.mean(axis=0, dtype=np.float64)
    blind = np.linalg.norm(model.embed_text(ids).numpy() - exact)
    found = []
    for count in SAMPLES:
        sampled = fused[stratified(np.arange(len(fused)), count)].mean(axis=0, dtype=np.float64)
        error = np.linalg.norm(sampled - exact)
        found.append((float(error / np.linalg.norm(exact)), float(error / blind)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_untrained_checkpoint(folder)
        model, prompt = LlavaMini.from_pretrained(checkpoint), Prompt.from_pretrained(checkpoint)
    size = model.config.image_size
    pictures = torch.stack([pixels(one, image_size=size, ratio=1) for one in film(options.frames, size)])
    found = [errors(model, torch.tensor(prompt.build(question)), pictures) for question in QUESTIONS]
    for count, (relative, against_blind) in zip(SAMPLES, np.mean(found, axis=0), strict=True):
        row = {
            "benchmark": "sampled text fusion",
            "case": f"K = {count} of {options.frames} frames, small model, untrained",
            "ratio": against_blind,
            "against": "the error of text fusion none",
            "relative_error": relative,
            "questions": len(QUESTIONS),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
