# SPDX-License-Identifier: MIT
"""Few cases that still cover every pair of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Option = tuple[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]], legal: Callable[[dict[str, Any]], bool], tries: int = 6
) -> list[dict[str, Any]]:
    """Cases such that every pair of values of two factors occurs together in one of them, if any legal case has it.

    Greedy and deterministic: each case starts from a pair still open and gives every other factor, in turn, the value
    which closes most open pairs (ties go round); the best of several factor orders is kept. `legal` also judges cases
    which lack factors, where it says False only if no completion is legal. Pairs which no legal case holds are dropped.

    >>> cover = pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]}, lambda case: True)
    >>> len(cover) < 8
    True
    """
    names = list(factors)
    open_pairs = {
        frozenset([(a, u), (b, v)]): None for a, b in combinations(names, 2) for u in factors[a] for v in factors[b]
    }
    cases = []
    while open_pairs:
        first = next(iter(open_pairs))
        best, gain = None, 0
        for turn in range(tries):
            rest = [name for name in names if name not in dict(first)]
            rest = rest[turn % len(rest) :] + rest[: turn % len(rest)] if rest else rest
            case = _complete(dict(first), rest, factors, legal, open_pairs, turn + len(cases))
            if case is None:
                break
            closed = len(_pairs(case) & open_pairs.keys())
            if closed > gain:
                best, gain = case, closed
        if best is None:  # no legal case holds this pair
            del open_pairs[first]
            continue
        best = {name: best[name] for name in names}
        cases.append(best)
        for pair in _pairs(best):
            open_pairs.pop(pair, None)
    return cases


def _complete(case, rest, factors, legal, open_pairs, turn) -> dict[str, Any] | None:
    """`case` with the factors `rest` filled in, greedily with backtracking; None if no legal case contains it."""
    if not legal(case):
        return None
    if not rest:
        return case
    name, others = rest[0], rest[1:]
    values = list(factors[name])
    values = values[turn % len(values) :] + values[: turn % len(values)]
    values.sort(key=lambda value: -sum(frozenset([(name, value), item]) in open_pairs for item in case.items()))
    for value in values:
        found = _complete({**case, name: value}, others, factors, legal, open_pairs, turn)
        if found is not None:
            return found
    return None


def _pairs(case: dict[str, Any]) -> set[frozenset[Option]]:
    return {frozenset(pair) for pair in combinations(case.items(), 2)}
