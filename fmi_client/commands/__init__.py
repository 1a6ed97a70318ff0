"""The commands of `fmi`, one module each; `fmi_client.cli` loads the one that is asked for."""

from __future__ import annotations

__all__: list[str] = []
