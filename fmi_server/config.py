"""Settings: how packets are aggregated, how updates are routed, and how the server runs.

The server reads its settings from flags, then the environment (`FMI_...`), then a YAML file, and checks
them all before it starts.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from fmi.plain_values import NameTwiceError, fields_once
from fmi.yaml_text import YAMLTextError, read_yaml
from fmi_server.privacy.budget import PRIVACY_SETTINGS, BudgetError, PrivacySettings
from fmi_server.privacy.noisy_means import PRIVATE_ESTIMATORS
from fmi_server.quotas import Quota, account_of_host

__all__ = [
    "ESTIMATORS",
    "PRIVACY_SETTINGS",
    "SITE_NAME",
    "AggregationConfig",
    "RouterConfig",
    "ServerSettings",
    "SettingsError",
    "load_settings",
    "unknown_variables",
]

ESTIMATORS: Final = ("trimmed_mean", "weighted_mean", "mean", "median", "mean_of_median")
"""The names that `metrics_aggregation` takes."""


@dataclass(frozen=True, slots=True)
class AggregationConfig:
    """How the packets of a cohort become one aggregate.

    Attributes:
        metrics_trim_alpha: Share of sites trimmed in each tail, in [0, 0.5).
        vote_min_sites: Sites needed before a signal, a hint or an edge has a value; at least 1.
        metrics_aggregation: The estimator, one of `ESTIMATORS`.
        dp_noise_sigma: Noise of differential privacy, as a standard deviation in units of the sensitivity.
            0, the default, derives it from the budget.
        dp_epsilon: Privacy budget epsilon, over `dp_epochs` releases. 0, the default, and no noise mean no
            privacy.
        dp_delta: Privacy budget delta, in (0, 1) with privacy; well below 1 over the number of sites.
        dp_sensitivity: The most that one site may move the noisy sums (L2), in units of half the width
            between a signal's bounds. 1.0, the default, derives it; a larger one asks for more noise.
        dp_epochs: Releases that the budget lasts for; 0 for as many as it allows with `dp_noise_sigma`.
        dp_clip_norm: The L2 norm to which the vector of a site is scaled down, in units of half the width
            between a signal's bounds, at least 0.01; a smaller one means less noise. None scales nothing.
        max_byzantine: Lying sites per signal that the trimmed mean must withstand. Where it is given,
            nothing has a value below `2 * max_byzantine + 1` sites. None means 1 from 3 sites on.
        weight_cap: The largest share of one site in an average, in (0, 1].

    Differential privacy needs cohorts whose signals are declared with both bounds (docs/privacy.md). There,
    nothing is trimmed and no share is capped, because both let one site change what others count for:
    `metrics_trim_alpha` and `weight_cap` do nothing, and the estimator is `mean` or `weighted_mean`;
    `trimmed_mean`, being the default, counts as `mean`.

    Raises:
        ValueError: A setting is out of its range.
        BudgetError: `dp_` settings contradict each other, or privacy and another setting do; it is a
            ValueError, and says what to change.
    """

    metrics_trim_alpha: float = 0.1
    vote_min_sites: int = 3
    metrics_aggregation: str = "trimmed_mean"
    dp_noise_sigma: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 0.0
    dp_sensitivity: float = 1.0
    dp_epochs: int = 1
    dp_clip_norm: float | None = None
    max_byzantine: int | None = None
    weight_cap: float = 0.25

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} must be a finite number, not {value}")
        for name in ("vote_min_sites", "max_byzantine", "dp_epochs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value >= 2**32):
                raise ValueError(f"{name} must be a whole number below 2^32, not {value!r}")
        if not 0 <= self.metrics_trim_alpha < 0.5:
            raise ValueError(
                f"metrics_trim_alpha must be in [0, 0.5), not {self.metrics_trim_alpha}: half or more "
                "in each tail leaves nothing"
            )
        if self.vote_min_sites < 1:
            raise ValueError(f"vote_min_sites must be at least 1, not {self.vote_min_sites}")
        if self.metrics_aggregation not in ESTIMATORS:
            raise ValueError(
                f"metrics_aggregation must be one of {', '.join(ESTIMATORS)}, "
                f"not {self.metrics_aggregation!r}"
            )
        if self.max_byzantine is not None and self.max_byzantine < 0:
            raise ValueError(f"max_byzantine must be at least 0, not {self.max_byzantine}")
        if not 0 < self.weight_cap <= 1:
            raise ValueError(f"weight_cap must be in (0, 1], not {self.weight_cap}")
        for name in ("dp_noise_sigma", "dp_epsilon", "dp_delta", "dp_sensitivity", "dp_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        self._check_privacy()

    @property
    def privacy(self) -> PrivacySettings:
        """What is asked of privacy."""
        return PrivacySettings(
            self.dp_epsilon,
            self.dp_delta,
            self.dp_noise_sigma,
            None if self.dp_sensitivity == 1.0 else self.dp_sensitivity,
            self.dp_epochs,
            self.dp_clip_norm,
        )

    def _check_privacy(self) -> None:
        self.privacy.check()
        if not self.privacy.private:
            return
        if self.metrics_aggregation not in (*PRIVATE_ESTIMATORS, "trimmed_mean"):
            raise BudgetError(
                "metrics_aggregation",
                f"is {self.metrics_aggregation}, which is not private: one site can move it by more than its "
                f"own value; choose {' or '.join(PRIVATE_ESTIMATORS)}",
            )
        if self.max_byzantine:
            raise BudgetError(
                "max_byzantine",
                f"is {self.max_byzantine}, but nothing is trimmed where privacy is asked for: leave it out",
            )


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How packets and updates are routed.

    Attributes:
        queue_packets: Packets that a named destination without a consumer holds; past it, `route`
            waits.
        max_subscribers: Subscriptions at the same time; past it, a new one is refused with a time to
            try again.
        progress_interval_s: Seconds between signs of life on an idle subscription.
        page_updates: Updates read from the store at once when a subscriber catches up.
        reconnects_per_s: Subscribers that are asked to come back per second after a drain.
    """

    queue_packets: int = 1024
    max_subscribers: int = 10_000
    progress_interval_s: float = 20.0
    page_updates: int = 64
    reconnects_per_s: float = 200.0

    def __post_init__(self) -> None:
        for name in ("queue_packets", "max_subscribers", "page_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("progress_interval_s", "reconnects_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


DEFAULT_QUOTA: Final = Quota(
    calls_per_s=500.0, packets_per_s=1000.0, bytes_per_s=8.0 * 2**20, streams=64
)
"""What a caller may take where callers are authenticated: up to a quarter of what one process can do."""

_PRIVACY_OF_A_COHORT: Final = (
    "is no setting of the server: privacy is asked for in a cohort file, under `privacy`, beside the bounds "
    "of the cohort's signals"
)
_CLIENT_VARIABLES: Final = frozenset(
    {"FMI_TARGET", "FMI_TOKEN", "FMI_TOKEN_FILE", "FMI_DOMAIN_ID", "FMI_DEBUG"}
)
SITE_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
"""What a site may be called, as the contract says."""

_PLATFORM_VARIABLE: Final = re.compile(r"_SERVICE_HOST$|_PORT(_|$)")


class SettingsError(Exception):
    """A setting is wrong. The message names it and says what to do, in a line for each thing."""


# Units, for docs/settings.md; `tools/generate_settings.py` writes it.
_ADDRESS: Final[dict[str, Any]] = {"unit": "HOST:PORT"}
_FOLDER: Final[dict[str, Any]] = {"unit": "folder"}
_FILE: Final[dict[str, Any]] = {"unit": "file"}
_BYTES: Final[dict[str, Any]] = {"unit": "bytes"}
_SECONDS: Final[dict[str, Any]] = {"unit": "seconds"}


class ServerSettings(BaseSettings):
    """How the server runs. Six of them suffice to start; each has a default.

    The environment variable of `data_dir` is `FMI_DATA_DIR`, and so on. After a change of this class, run
    `tools/generate_settings.py`.
    """

    model_config = SettingsConfigDict(env_prefix="FMI_", extra="forbid", frozen=True)

    listen: str = Field(
        default="127.0.0.1:50061",
        description="address and port; port 0 picks one",
        json_schema_extra=_ADDRESS,
    )
    data_dir: Path = Field(
        default=Path("fmi-data"),
        description="where the SQLite store lives, or this server's view of what brokers have",
        json_schema_extra=_FOLDER,
    )
    store: str = Field(
        default="sqlite",
        description="where packets are kept; NATS JetStream brokers may be shared by several servers",
        json_schema_extra={"unit": "`sqlite`, `memory`, or `nats://HOST,HOST,HOST/NAME`"},
    )
    store_replicas: int = Field(
        default=1,
        description="brokers that keep each packet, as whichever server comes first asks of them",
        json_schema_extra={"unit": "1, 3 or 5"},
    )
    store_login: Path | None = Field(
        default=None,
        description="file with the `USER:PASSWORD` that the brokers want",
        json_schema_extra=_FILE,
    )
    store_ca: Path | None = Field(
        default=None,
        description="PEM file of the authorities of the brokers' certificates; by default the system's",
        json_schema_extra=_FILE,
    )
    store_cert: Path | None = Field(
        default=None,
        description="PEM file of the certificate that this server shows the brokers",
        json_schema_extra=_FILE,
    )
    store_key: Path | None = Field(
        default=None, description="PEM file of the key of store_cert", json_schema_extra=_FILE
    )
    lease_s: float = Field(
        default=6.0,
        ge=2,
        le=60,
        description="seconds after which a server that does not answer has lost what it releases alone",
        json_schema_extra=_SECONDS,
    )
    cohorts: Path | None = Field(
        default=None, description="folder of cohort files (*.yaml)", json_schema_extra=_FOLDER
    )
    open_cohorts: bool = Field(default=True, description="open undeclared cohorts on demand")
    force_cohorts: bool = Field(
        default=False, description="put cohort files in force that would break sites"
    )
    parent: str | None = Field(
        default=None,
        description="address and port of a parent server that gets the priors; none by default",
        json_schema_extra=_ADDRESS,
    )
    parent_domain_id: str | None = Field(
        default=None,
        description="the name of this server as a site of its parent",
        json_schema_extra={"unit": "site name"},
    )
    parent_ca: Path | None = Field(
        default=None,
        description="PEM file of the authorities of the parent's certificate; none by default: plain text",
        json_schema_extra=_FILE,
    )
    parent_cert: Path | None = Field(
        default=None,
        description="PEM file of the certificate that this server shows its parent",
        json_schema_extra=_FILE,
    )
    parent_key: Path | None = Field(
        default=None, description="PEM file of the key of parent_cert", json_schema_extra=_FILE
    )
    parent_token: Path | None = Field(
        default=None,
        description="file with the bearer token that this server shows its parent",
        json_schema_extra=_FILE,
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least severe log line that is written"
    )
    log_format: Literal["text", "json"] = Field(default="text", description="form of the log lines")
    metrics_listen: str | None = Field(
        default=None,
        description="address and port of the Prometheus page; none by default",
        json_schema_extra=_ADDRESS,
    )
    health_listen: str | None = Field(
        default=None,
        description="address and port of health in plain text, for probes; none by default",
        json_schema_extra=_ADDRESS,
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM file of the server's certificate chain; none by default: plain text",
        json_schema_extra=_FILE,
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file of the key of tls_cert", json_schema_extra=_FILE
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of the authorities of client certificates, which are then required",
        json_schema_extra=_FILE,
    )
    tls_crl: Path | None = Field(
        default=None,
        description="PEM file of the client certificates that their authorities revoked",
        json_schema_extra=_FILE,
    )
    tokens: Path | None = Field(
        default=None,
        description="file of the bearer tokens that are taken; see `fmi-server tokens`",
        json_schema_extra=_FILE,
    )
    operators: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="principals that operate the server; a list, or names with commas between them",
        json_schema_extra={"unit": "principals"},
    )
    audit_log: Path | None = Field(
        default=None,
        description="file to which calls of operators and refusals are appended",
        json_schema_extra=_FILE,
    )
    insecure: bool = Field(
        default=False, description="allow to listen beyond loopback without TLS or authentication"
    )
    admin: bool = Field(default=True, description="serve AdminService")
    reflection: bool = Field(
        default=True,
        description="serve reflection, and channelz where that is safe; to operators only where callers are "
        "authenticated",
    )
    max_message_bytes: int = Field(
        default=4 * 2**20,
        ge=2**16,
        le=2**30,
        description="largest gRPC message taken",
        json_schema_extra=_BYTES,
    )
    max_batch_packets: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="most packets in one envelope or batch",
        json_schema_extra={"unit": "packets"},
    )
    max_batch_bytes: int = Field(
        default=16 * 2**20,
        ge=2**16,
        le=2**30,
        description="most bytes an envelope may decode to",
        json_schema_extra=_BYTES,
    )
    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="connections at the same time; further ones are closed at once",
        json_schema_extra={"unit": "connections"},
    )
    max_connection_calls: int = Field(
        default=128,
        ge=1,
        le=100_000,
        description="calls at the same time on one connection; further ones wait at the client",
        json_schema_extra={"unit": "calls"},
    )
    max_memory_bytes: int | None = Field(
        default=None,
        ge=0,
        description="resident memory past which calls are refused; by default 80 % of all, 0 for any",
        json_schema_extra=_BYTES,
    )
    max_inflight: int = Field(
        default=10_000,
        ge=1,
        description="Emit calls at work at once; past it they are refused",
        json_schema_extra={"unit": "calls"},
    )
    max_subscribers: int = Field(
        default=10_000,
        ge=1,
        description="subscriptions at the same time",
        json_schema_extra={"unit": "subscriptions"},
    )
    max_cohorts: int = Field(
        default=10_000,
        ge=1,
        description="cohorts at most; no more are opened on demand past it",
        json_schema_extra={"unit": "cohorts"},
    )
    quota_calls_per_s: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="calls that one caller may make; by default 500 where callers are authenticated, "
        "0 for any",
        json_schema_extra={"unit": "calls per second"},
    )
    quota_packets_per_s: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="packets that one caller may send; by default 1000 where callers are authenticated, "
        "0 for any",
        json_schema_extra={"unit": "packets per second"},
    )
    quota_bytes_per_s: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="bytes of packets that one caller may send; by default 8 MiB where callers are "
        "authenticated, 0 for any",
        json_schema_extra={"unit": "bytes per second"},
    )
    quota_streams: int | None = Field(
        default=None,
        ge=0,
        description="EmitStream calls and subscriptions of one caller at the same time; by default 64 where "
        "callers are authenticated, 0 for any",
        json_schema_extra={"unit": "streams"},
    )
    quota_cohorts: int | None = Field(
        default=None,
        ge=0,
        description="cohorts that one caller's packets may open; 0 for any, the default",
        json_schema_extra={"unit": "cohorts"},
    )
    quotas: Annotated[dict[str, Quota], NoDecode] = Field(
        default={},
        description="other quotas of single callers, by principal, or by address where callers are not "
        "authenticated; JSON in a flag or a variable",
        json_schema_extra={"unit": "quotas by principal"},
    )
    progress_interval_s: float = Field(
        default=20.0,
        gt=0,
        le=30,
        description="seconds between signs of life on a subscription",
        json_schema_extra=_SECONDS,
    )
    drain_s: float = Field(
        default=10.0,
        ge=0,
        description="seconds that calls have to end after SIGTERM",
        json_schema_extra=_SECONDS,
    )

    @field_validator("store_replicas")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value not in (1, 3, 5):
            raise ValueError("must be 1, 3 or 5: a majority of them decides")
        return value

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if value in ("sqlite", "memory"):
            return value
        if "://" not in value:
            raise ValueError("must be sqlite, memory, or the URL of brokers, as nats://a,b,c")
        if "@" in value:
            raise ValueError("must have no user and password: put them into a file, as store_login")
        return value

    @field_validator("listen", "metrics_listen", "health_listen", "parent")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        host, separator, port = value.rpartition(":")
        given = separator and port.isdecimal() and int(port) <= 65535
        if not given or not _is_host(host):
            raise ValueError("must be HOST:PORT, for example 127.0.0.1:50061 or [::1]:50061")
        return value

    @field_validator("parent")
    @classmethod
    def _port_of_parent(cls, value: str | None) -> str | None:
        if value is not None and value.endswith(":0"):
            raise ValueError("must name the port on which the parent listens")
        return value

    @field_validator("parent_domain_id")
    @classmethod
    def _site_name(cls, value: str | None) -> str | None:
        if value is not None and not SITE_NAME.fullmatch(value):
            raise ValueError(
                "must be 1 to 128 letters, digits and ._:@- that begin with a letter or a digit"
            )
        return value

    @field_validator("operators", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("operators")
    @classmethod
    def _principals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name or name == "*" or not name.isprintable():
                raise ValueError("must be names of principals, each printable, and not `*`")
        return value

    @field_validator("quotas", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value, object_pairs_hook=fields_once)
        except NameTwiceError as error:
            told = f"{error.name!r} stands twice in one object; leave one of them out"
            raise ValueError(told) from None
        except ValueError:
            raise ValueError("must be quotas by principal, as JSON") from None

    @property
    def quota(self) -> Quota:
        """What a caller may take where `quotas` says nothing of it."""
        given = Quota(
            self.quota_calls_per_s,
            self.quota_packets_per_s,
            self.quota_bytes_per_s,
            self.quota_streams,
            self.quota_cohorts,
        )
        return given.over(DEFAULT_QUOTA if self.authenticated else Quota())

    @property
    def authenticated(self) -> bool:
        """Whether callers are authenticated. Then what is not allowed is denied."""
        return self.tls_client_ca is not None or self.tokens is not None

    @model_validator(mode="after")
    def _what_security_needs(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: a certificate and its key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs TLS: set tls_cert and tls_key too")
        if self.tls_crl is not None and self.tls_client_ca is None:
            raise ValueError("tls_crl is about client certificates: set tls_client_ca too")
        if (self.parent_cert is None) != (self.parent_key is None):
            raise ValueError(
                "parent_cert and parent_key belong together: a certificate and its key"
            )
        if self.parent_cert is not None and self.parent_ca is None:
            raise ValueError("parent_cert needs TLS to the parent: set parent_ca too")
        if (self.store_cert is None) != (self.store_key is None):
            raise ValueError("store_cert and store_key belong together: a certificate and its key")
        for name in ("store_login", "store_ca", "store_cert"):
            if getattr(self, name) is not None and "://" not in self.store:
                raise ValueError(f"{name} is about brokers: set store to their URL too")
        if self.parent is None and (self.parent_ca or self.parent_token):
            raise ValueError("parent_ca and parent_token are of no use without a parent")
        if self.operators and not self.authenticated:
            raise ValueError(
                "operators needs callers that are authenticated: set tls_client_ca or tokens too"
            )
        return self

    @model_validator(mode="after")
    def _whose_quotas(self) -> Self:
        """Refuse quotas that would be nobody's."""
        for name in self.quotas:
            if self.authenticated:
                if name in self.operators:
                    raise ValueError(
                        f"quotas: {name!r} is an operator, and operators have no quotas"
                    )
                continue
            try:
                account = account_of_host(name)
            except ValueError:
                raise ValueError(
                    f"quotas: callers are not authenticated, so each is an address, and {name!r} is none"
                ) from None
            if account != name:
                raise ValueError(f"quotas: {name!r} must be written as {account!r}")
        return self

    @model_validator(mode="after")
    def _both_of_a_parent(self) -> Self:
        if (self.parent is None) != (self.parent_domain_id is None):
            raise ValueError(
                "parent and parent_domain_id belong together: the address of the parent, and the name "
                "under which it knows this server"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put flags before the environment."""
        del settings_cls, dotenv_settings, file_secret_settings
        return (init_settings, env_settings)


def _is_host(text: str) -> bool:
    try:
        return bool(text.encode("idna"))
    except UnicodeError:  # the resolver would raise it too: an empty label, or one that is too long
        return False


def load_settings(flags: dict[str, Any], *, config_file: Path | None = None) -> ServerSettings:
    """Read the settings from flags, environment and file, in that order, and check them.

    Args:
        flags: Settings given on the command line, by name; those not given are absent.
        config_file: A YAML file with settings by name.

    Raises:
        SettingsError: A setting is unknown or wrong, or the file cannot be read.
    """
    in_file = {} if config_file is None else _settings_of(config_file)
    for variable in sorted(os.environ):
        name = variable.lower().removeprefix("fmi_")
        if variable.upper().startswith("FMI_") and name in PRIVACY_SETTINGS:
            raise SettingsError(f"{name}: {_PRIVACY_OF_A_COHORT}")

    class FromFile(ServerSettings):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **sources: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            others = super().settings_customise_sources(settings_cls, *args, **sources)
            return (*others, InitSettingsSource(settings_cls, init_kwargs=in_file))

    try:
        return FromFile(**flags)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = ".".join(map(str, item["loc"])) or "settings"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = _PRIVACY_OF_A_COHORT if name in PRIVACY_SETTINGS else _unknown(name)
            if item["type"] == "unexpected_keyword_argument":
                message = f"is no quota; there are {', '.join(one.name for one in fields(Quota))}"
            # What is wrong with the settings as a whole has all of them as its input.
            shown = item["loc"] and item["type"] not in _WITHOUT_INPUT
            lines.append(f"{name}: {message}" + (f", not {_shown(item['input'])}" if shown else ""))
        raise SettingsError("; ".join(lines)) from None


_WITHOUT_INPUT: Final = ("missing", "extra_forbidden", "unexpected_keyword_argument")
"""Problems that are not with the value."""


def _shown(value: object) -> str:
    """Write a value that somebody gave, in a few dozen characters however large it is."""
    bounded = reprlib.Repr()
    bounded.maxlevel = 2
    bounded.maxstring = bounded.maxother = 100
    try:
        return bounded.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number that is too long"


def unknown_variables(names: Iterable[str]) -> list[str]:
    """Say of each environment variable that looks like a setting and is none what it may have meant.

    Variables that the client reads, and those that container platforms set for each of their services,
    are passed over.
    """
    told = []
    for variable in sorted(names):
        upper = variable.upper()
        name = upper.removeprefix("FMI_").lower()
        if (
            upper.startswith("FMI_")
            and upper not in _CLIENT_VARIABLES
            and not _PLATFORM_VARIABLE.search(upper)
            and name not in ServerSettings.model_fields
        ):
            likely = _likely(name)
            meant = f"; did you mean FMI_{likely.upper()}?" if likely else ""
            told.append(f"{variable} is set, but there is no such setting{meant}")
    return told


def _unknown(name: str) -> str:
    likely = _likely(name)
    return f"is no setting; did you mean {likely}?" if likely else "is no setting"


def _likely(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name, ServerSettings.model_fields, 1)), None)


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except YAMLTextError as error:
        raise SettingsError(f"{path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must have settings by name, not a {type(content).__name__}")
    if unnamed := [name for name in content if not isinstance(name, str)]:
        raise SettingsError(f"{path}: must have settings by name; {_shown(unnamed[0])} is none")
    return content
