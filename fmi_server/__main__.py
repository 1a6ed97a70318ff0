"""`python -m fmi_server` is the `fmi-server` command."""

from __future__ import annotations

from fmi_server.cli import main

if __name__ == "__main__":
    main()
