"""What is public, and what importing it costs."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import fmi_client
from fmi_client import AsyncFMIClient, FMIClient, errors
from fmi_client.admin import AsyncAdmin
from fmi_client.client import Admin, BlockingSubscription
from fmi_client.subscription import Subscription


def test_public_names():
    error_names = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.FMIError)
    }
    assert set(fmi_client.__all__) == error_names | {
        "AsyncFMIClient",
        "FMIClient",
        "FMIEmitter",
        "FMIEncoder",
        "FileOutbox",
        "LocalPrivacy",
        "Outbox",
        "PacketType",
        "Receipt",
        "RetryPolicy",
        "SignalBounds",
        "Subscription",
        "TLSConfig",
        "Violation",
        "consensus_to_dot",
        "consensus_to_graphml",
    }
    assert all(hasattr(fmi_client, name) for name in fmi_client.__all__)


@pytest.mark.parametrize(
    ("one", "other", "only_async"),
    [
        (AsyncFMIClient, FMIClient, {"aclose"}),
        (AsyncAdmin, Admin, set()),
        (Subscription, BlockingSubscription, {"aclose"}),
    ],
)
def test_both_clients_have_the_same_methods(one, other, only_async):
    def methods(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert methods(one) - only_async <= methods(other)
    for name in methods(one) & methods(other):
        ours, theirs = getattr(one, name), getattr(other, name)
        if inspect.isfunction(ours) and name != "wait":
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            ), name


@pytest.mark.parametrize("client", [FMIClient, AsyncFMIClient])
def test_help_shows_what_an_operator_can_do(client):
    shown = pydoc.render_doc(client, renderer=pydoc.plaintext)
    assert re.search(r"\| +admin\n \| +The operator's calls: ", shown)


def test_constructors_have_the_same_arguments():
    assert str(inspect.signature(AsyncFMIClient)) == str(inspect.signature(FMIClient))


def test_importing_the_client_imports_no_numpy_and_no_server():
    code = (
        "import sys; from fmi_client import FMIClient, FMIEmitter, FMIEncoder; "
        "FMIEmitter('s').emit_msp(controller={'tau': 1}); "
        "print([m for m in ('numpy', 'fmi_server', 'rich', 'click', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_program_that_forgets_to_close_ends():
    code = (
        "from fmi_client import FMIClient, RetryPolicy, ConnectionFailedError\n"
        "client = FMIClient('127.0.0.1:9', domain_id='s', retry=RetryPolicy(max_attempts=1))\n"
        "try:\n"
        "    client.emit_msp(controller={'tau': 1})\n"
        "except ConnectionFailedError:\n"
        "    print('told')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "told"
    assert done.stderr == ""
