"""How far people agree: Krippendorff's alpha for ordinal values."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import product


def alpha(units: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha: 1 where all agree, 0 where they agree as often as by chance, below 0 where less often.

    units: per thing that was judged the values that people gave it, of which only the order counts. Things with one
    value are left out. None where fewer than two values are left, or all are equal: then chance cannot disagree.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): coincidences o_ck, their margins
    n_c, alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck, with the ordinal difference
    d_ck = (n_c / 2 + sum of the margins between c and k + n_k / 2)^2. With two values it is the nominal alpha.
    """
    coincidences: dict[tuple[float, float], float] = defaultdict(float)
    for values in units:
        for one, other in product(range(len(values)), repeat=2):
            if one != other:
                coincidences[values[one], values[other]] += 1 / (len(values) - 1)
    margins: dict[float, float] = defaultdict(float)
    for (value, _), count in coincidences.items():
        margins[value] += count
    middle: dict[float, float] = {}
    """Value -> how many values are below it, and half of those that equal it: differences of these are ordinal."""
    below = 0.0
    for value in sorted(margins):
        middle[value] = below + margins[value] / 2
        below += margins[value]
    observed = sum(count * (middle[c] - middle[k]) ** 2 for (c, k), count in coincidences.items())
    expected = sum(margins[c] * margins[k] * (middle[c] - middle[k]) ** 2 for c, k in product(margins, repeat=2))
    return 1 - (below - 1) * observed / expected if expected else None
