from __future__ import annotations

import numpy as np
import pytest

from benchmarks.warm_start.tables import Parameter, Space, table_of

SIDE = 10


@pytest.fixture
def space():
    """Two axes of ten levels, one by magnitude, and one of three."""
    return Space(
        (
            Parameter("rate", tuple(float(10.0**i) for i in range(-6, 4)), log=True),
            Parameter("momentum", tuple(i / (SIDE - 1) for i in range(SIDE)), log=False),
            Parameter("depth", (1.0, 2.0, 3.0), log=False),
        )
    )


@pytest.fixture
def bowl(space):
    """A table with its smallest error at (7, 2, 1) and its largest at (0, 9, 2)."""
    i, j, k = np.indices(space.shape)
    error = ((i - 7) ** 2 + (j - 2) ** 2 + (k - 1) ** 2) / 200.0
    error[0, 9, 2] = 0.9
    return table_of("bowl", space, np.stack([error - 0.01, error, error + 0.01], axis=-1))
