"""The 95 % Wilson interval of a success rate.

    from logbook import wilson

    low, high = wilson(successes=47, episodes=50)

Source: Wilson (1927); compared with its rivals by Newcombe, Statistics in Medicine 17 (1998).
Not here: comparisons of two rates (benchmarks/compare.py).
"""

import math


def wilson(successes: int, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval's ends as shares between 0 and 1.

    It stays within 0 and 1 and keeps a width at both ends, where rate +- 1.96 standard errors
    would claim certainty after a handful of episodes.
    """
    rate = successes / episodes
    shrink = 1 + z * z / episodes
    center = (rate + z * z / (2 * episodes)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    low = max(0.0, min(rate, center - half))  # rounding at 0 and at 1
    high = min(1.0, max(rate, center + half))
    return low, high
