"""Split scikit-learn's digits among sites: each site has the handwriting of one writer.

The 1,797 images are rows of 64 grey values. They stand in the order in which the writers filled in
their forms, so the split is the one that nature made: the sites differ as people's handwriting differs,
and nothing is simulated. The labels show it: a form begins with 0 to 9, three times over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fmi_demo.events import site_name
from fmi_demo.scenario import MAX_SITES, MIN_SITES

__all__ = ["FORM_STARTS", "SitePart", "handwriting", "split_digits"]

FORM_STARTS: Final = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667)
"""First row of each of the 14 forms, as in "Sample grouping" of the scikit-learn course of Inria."""

_GREY_LEVELS: Final = 16.0
_SIDE: Final = 8


@dataclass(frozen=True, slots=True, eq=False)
class SitePart:
    """The part of the data set that one site has.

    Attributes:
        site_id: The site.
        form: Index of the form (the writer), 0 to 13.
        rows: Row numbers in the data set, shape (n,).
        images: Grey values in 0..1, shape (n, 64).
        labels: The digits written, shape (n,).
    """

    site_id: str
    form: int
    rows: NDArray[np.int64]
    images: NDArray[np.float64]
    labels: NDArray[np.int64]


def split_digits(sites: int, *, seed: int) -> tuple[list[SitePart], SitePart]:
    """Give each site the form of one writer, in an order drawn from `seed`.

    Returns:
        The parts of `site-01` ... and, apart, the part of `late-site`.

    Raises:
        ValueError: `sites` is not in `MIN_SITES` to `MAX_SITES`.
    """
    if not MIN_SITES <= sites <= MAX_SITES:
        raise ValueError(f"sites must be {MIN_SITES} to {MAX_SITES}, not {sites}")
    images, labels = load_digits(return_X_y=True)
    ends = (*FORM_STARTS[1:], len(labels))
    forms = np.random.default_rng(seed).permutation(len(FORM_STARTS))

    def part(site_id: str, form: int) -> SitePart:
        rows = np.arange(FORM_STARTS[form], ends[form], dtype=np.int64)
        return SitePart(
            site_id=site_id,
            form=form,
            rows=rows,
            images=np.asarray(images[rows] / _GREY_LEVELS, dtype=np.float64),
            labels=np.asarray(labels[rows], dtype=np.int64),
        )

    parts = [part(site_name(i), int(forms[i])) for i in range(sites)]
    return parts, part("late-site", int(forms[-1]))


def handwriting(images: NDArray[np.float64]) -> dict[str, float]:
    """Describe a hand by means over its images: these are the concepts that a site reports.

    Args:
        images: Grey values in 0..1, shape (n, 64).

    Returns:
        `ink`, the mean grey value; `width` and `height`, the standard deviation of the ink across and
        down, in pixels; `slant`, the slope of the ink to the right per pixel up.
    """
    ink = images.reshape(-1, _SIDE, _SIDE)
    mass = ink.sum(axis=(1, 2))
    at = np.arange(_SIDE)
    down = at - (ink.sum(axis=2) @ at / mass)[:, None]
    across = at - (ink.sum(axis=1) @ at / mass)[:, None]
    var_down = (ink.sum(axis=2) * down**2).sum(axis=1) / mass
    var_across = (ink.sum(axis=1) * across**2).sum(axis=1) / mass
    together = np.einsum("nij,ni,nj->n", ink, down, across) / mass
    return {
        "ink": float(ink.mean()),
        "width": float(np.sqrt(var_across).mean()),
        "height": float(np.sqrt(var_down).mean()),
        "slant": float(-(together / var_down).mean()),
    }
