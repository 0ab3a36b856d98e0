"""How often each group of decodes is timed. Imports no torch: plans reckon with it too."""

from __future__ import annotations

import math
from collections.abc import Mapping


def rounds_for(work: Mapping[str, float], rounds: int, least: int = 6) -> dict[str, int]:
    """Share out rounds: `rounds` for the group with the least work, fewer for longer ones, at least `least` of them.

    A long decode averages more of the noise, so equal time gives about equal precision; under `least` = 6 rounds
    there is no distribution-free interval. `rounds` below that hold for all groups.
    """
    lightest = min(work.values())
    return {g: min(rounds, max(least, math.ceil(rounds * lightest / w))) for g, w in work.items()}
