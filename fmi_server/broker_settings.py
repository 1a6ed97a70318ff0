"""The store at brokers, made from the settings of a server."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fmi_server.config import ServerSettings, SettingsError
from fmi_server.storage import JetStreamStore
from fmi_server.storage.jetstream_broker import BrokerOptions
from fmi_server.storage.jetstream_names import BrokerAddress

__all__ = ["broker_options", "broker_store", "wrong_broker_settings"]

PATIENCE_S: Final = 6.0
"""Seconds within which brokers that do not answer are told of: before the SDK's own deadline of 10."""

OPEN_PATIENCE_S: Final = 30.0
"""Seconds for which a server that starts waits for brokers: they may start too, or be choosing a leader."""


def broker_store(settings: ServerSettings, view: Path) -> JetStreamStore:
    """Make the store; nothing is connected yet.

    Raises:
        SettingsError: A file that the settings name cannot be used.
    """
    return JetStreamStore(settings.store, view, options=broker_options(settings))


def broker_options(settings: ServerSettings) -> BrokerOptions:
    """Return how a log is made, and how to get to the brokers.

    Raises:
        SettingsError: A file that the settings name cannot be used.
    """
    return BrokerOptions(
        replicas=settings.store_replicas,
        patience_s=PATIENCE_S,
        open_patience_s=OPEN_PATIENCE_S,
        tls=_tls(settings),
        login=_login(settings),
    )


def wrong_broker_settings(settings: ServerSettings) -> Iterator[str]:
    """Say what is wrong with the URL of brokers, and with the files that settings name for them."""
    if "://" not in settings.store:
        return
    try:
        BrokerAddress.parse(settings.store)
    except ValueError as error:
        yield f"store: {error}"
    for read in (_tls, _login):
        try:
            read(settings)
        except SettingsError as error:
            yield str(error)


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.store_ca is None and settings.store_cert is None:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.store_ca)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"store_ca: {settings.store_ca} cannot be used: {error}") from None
    if settings.store_cert is not None and settings.store_key is not None:
        try:
            context.load_cert_chain(settings.store_cert, settings.store_key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"store_cert, store_key: {settings.store_cert} cannot be used: {error}"
            ) from None
    return context


def _login(settings: ServerSettings) -> tuple[str, str] | None:
    if settings.store_login is None:
        return None
    try:
        text = settings.store_login.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"store_login: {settings.store_login} cannot be read: {error}"
        ) from None
    user, colon, password = text.partition(":")
    if not user or not colon or not password or not text.isprintable():
        raise SettingsError(f"store_login: {settings.store_login} must have one line USER:PASSWORD")
    return user, password
