"""Strongly connected components of a directed graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["strong_components"]


def strong_components(successors: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """Return the strongly connected components, each sorted (Tarjan, SIAM J. Comput. 1, 1972).

    Without recursion, so that a long chain of causes cannot exhaust the stack.

    Args:
        successors: node -> nodes it points to; nodes that only appear as targets count too.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    place: dict[str, int] = {}
    found: list[tuple[str, ...]] = []
    for root in successors:
        if root in index:
            continue
        index[root] = low[root] = len(index)
        place[root] = len(stack)
        stack.append(root)
        path = [(root, iter(successors.get(root, ())))]
        while path:
            node, remaining = path[-1]
            for target in remaining:
                if target not in index:
                    index[target] = low[target] = len(index)
                    place[target] = len(stack)
                    stack.append(target)
                    path.append((target, iter(successors.get(target, ()))))
                    break
                if target in place:
                    low[node] = min(low[node], index[target])
            else:
                path.pop()
                if path:
                    parent = path[-1][0]
                    low[parent] = min(low[parent], low[node])
                if low[node] == index[node]:
                    component = stack[place[node] :]
                    del stack[place[node] :]
                    for member in component:
                        del place[member]
                    found.append(tuple(sorted(component)))
    return found
