"""The bearer token of a client: given as text, or kept in a file that is read again when it changes."""

from __future__ import annotations

from pathlib import Path

from fmi_client.errors import ConfigurationError

__all__ = ["TokenSource"]


class TokenSource:
    """Where a token comes from.

    Args:
        given: The token, or the path of a file that has it; None for none.

    Raises:
        ConfigurationError: It is neither, or the file cannot be read, or is empty.
    """

    def __init__(self, given: str | Path | None) -> None:
        if not isinstance(given, str | Path | None):
            raise ConfigurationError(
                f"token must be a text or the Path of a file, not of type {type(given).__name__}"
            )
        self._given = given
        self._seen: tuple[int, int, int] | None = None
        self._text = None if isinstance(given, Path) else given
        if isinstance(given, Path):
            self._read(given)

    def __repr__(self) -> str:
        return f"TokenSource({self._given if isinstance(self._given, Path) else '...'})"

    @property
    def text(self) -> str | None:
        """The token; None where there is none.

        A file that is away or empty for a moment, because it is just being replaced, changes nothing.
        """
        if isinstance(self._given, Path):
            try:
                self._read(self._given)
            except ConfigurationError:
                if self._text is None:
                    raise
        return self._text

    def _read(self, path: Path) -> None:
        try:
            found = path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return
            text = path.read_bytes().decode("ascii", errors="replace").strip()
        except OSError as error:
            raise ConfigurationError(
                f"token file {path}: cannot be read: {error.strerror}"
            ) from None
        if not text:
            raise ConfigurationError(f"token file {path}: is empty")
        self._text, self._seen = text, seen
