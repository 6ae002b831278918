"""Our runs beside the paper's: the difference, its interval and two kinds of test.

Welch's test asks whether the means differ. That it finds nothing does not show that they are
equal: two one-sided tests ask whether the difference is smaller than a margin.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """The difference of two means, ours minus theirs, without an assumption of equal variances.

    Attributes:
        difference: of the means.
        low, high: its 95 % confidence interval.
        p: of Welch's test, for a difference of 0.
        p_margin: of two one-sided tests, for a difference of the margin or more; the larger one.
    """

    difference: float
    low: float
    high: float
    p: float
    p_margin: float

    def __str__(self) -> str:
        return f"{self.difference:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def compare(
    ours: tuple[float, float, int], theirs: tuple[float, float, int], margin: float
) -> Comparison:
    """Compare two samples by their means, standard deviations and sizes.

    Raises:
        ImportError: if SciPy is not installed.
    """
    from scipy.stats import t  # importing it takes a second

    difference = ours[0] - theirs[0]
    variances = [std**2 / n for _, std, n in (ours, theirs)]
    error = math.sqrt(sum(variances))
    # Welch-Satterthwaite equation
    freedom = sum(variances)**2 / sum(
        variance**2 / (n - 1) for variance, (_, _, n) in zip(variances, (ours, theirs))
    )
    half = t.ppf(0.975, freedom) * error
    p = 2 * t.sf(abs(difference) / error, freedom)
    p_margin = t.sf((margin - abs(difference)) / error, freedom)
    return Comparison(*map(float, (difference, difference - half, difference + half, p, p_margin)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the number of tests, by Holm's method."""
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
