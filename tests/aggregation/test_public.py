from __future__ import annotations

import subprocess
import sys

from fmi_server import aggregation


def test_what_is_public():
    assert sorted(aggregation.__all__, key=str) == sorted(set(aggregation.__all__))
    for name in aggregation.__all__:
        assert getattr(aggregation, name).__class__ is not type(aggregation), name


def test_the_package_needs_numpy_only():
    code = (
        "import sys, fmi_server.aggregation\n"
        "wrong = {'scipy', 'google', 'grpc', 'statsmodels', 'networkx'} & set(sys.modules)\n"
        "assert not wrong, wrong\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
