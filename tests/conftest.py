"""Which examples Hypothesis tries, for all tests.

`fixed`, the default, tries the same examples in each run: whether a run passes depends on the code alone.
`search` tries others in each run and keeps what fails in `.hypothesis`; `make search` chooses it. How long
an example takes says how busy the machine is, so neither profile looks at that.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed",
    database=None,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search",
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fixed")
