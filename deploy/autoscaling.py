"""How many ingest replicas the registered cameras and files need."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


class SourcesPolicy:
    """Scales ingest on what there is to read, not on requests: nobody calls ingest.

    Every replica reports how many sources it owns and how many in the whole registry nobody owns.
    """

    def __init__(self, target_sources: int) -> None:
        self._target = target_sources

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        owned = sum(metrics.get("owned", {}).values())
        unowned = max(metrics.get("unowned", {}).values(), default=0)
        wanted = math.ceil((owned + unowned) / self._target)
        bounded = min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
        return bounded, {}
