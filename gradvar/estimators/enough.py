"""How many responses CV <= 1 takes, from the CVs at the group sizes that were estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from gradvar.runs.records import Estimate

AT_MOST = "at most"
"""Verdict where the smallest estimated size is enough already."""


def responses_for_cv_1(estimated: Mapping[int, Estimate]) -> tuple[int, Estimate, str]:
    """How large a group CV <= 1 takes, from the CVs at the estimated sizes.

    n CV^2 at the smallest estimated size n whose CV is at most 1, which has the silent groups of about that size in
    it; where no size is, at the largest, from where CV^2 falls as 1/n. Not less than the size below where its CV is
    above 1, nor is the lower end where that is resolved. Where the smallest estimated size has a CV of at most 1
    already nothing is known below it but that more groups are silent there: the answer is "at most" that size, from 2
    responses on.

    Returns:
        (the size it rests on, the estimate, its verdict: "resolved", "at most" or "unresolved").
    """
    sizes = sorted(estimated)
    enough = [n for n in sizes if estimated[n].value <= 1.0]
    size = enough[0] if enough else sizes[-1]
    cv = estimated[size]
    method = f"n CV^2 at n = {size}; {cv.method}"
    low, value, high = (size * end**2 for end in (cv.low, cv.value, cv.high))
    if size == sizes[0] and enough:
        method = f"at most {size}, the smallest size estimated: below it more groups are silent; {method}"
        least = math.nan if math.isnan(low) else 2.0
        most = math.nan if math.isnan(high) else max(float(size), high)
        return size, replace(cv, value=float(size), low=least, high=most, method=method), AT_MOST
    below = sizes[sizes.index(size) - 1] if enough else size
    floor = float(below) if estimated[below].value > 1.0 and enough else 0.0
    sure = floor if estimated[below].low > 1.0 else 0.0
    found = replace(cv, value=max(value, floor), low=max(low, sure), high=max(high, floor), method=method)
    return size, found, "resolved" if math.isfinite(found.value) else "unresolved"
