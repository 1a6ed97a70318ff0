"""What is fuzzed without a server: each target takes bytes and raises where an input does what none may."""

from __future__ import annotations

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import samples
import yaml
import zstandard
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from mutation import mutated, mutated_bytes
from oracle import Finding, assert_explained
from plain_values import changed_plain

from fmi.plain import packet_to_plain
from fmi.specs import read_cohort_spec
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.yaml_text import YAMLTextError, parse_yaml
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.emission import Answer, Intake
from fmi_server.envelope import EnvelopeDecoder, EnvelopeLimits
from fmi_server.errors import FMIError, Reason
from fmi_server.feed_requests import FeedRequest
from fmi_server.patterns import PatternSet
from fmi_server.spec_checks import spec_violations
from fmi_server.validator import FMIValidator

__all__ = ["TARGETS", "Target"]

_REGISTRY = FMIContractRegistry()


class Target(ABC):
    """Something that takes bytes.

    Attributes:
        name: What it is called.
        most: Bytes of an input at most.
    """

    name: str
    most: int = 4096

    @abstractmethod
    def seeds(self) -> Iterator[bytes]:
        """Inputs to begin with."""

    @abstractmethod
    def __call__(self, data: bytes) -> None:
        """Take an input.

        Raises:
            Exception: It did what no input may do.
        """

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Change an input so that it stays one of the kind that the target takes."""
        return mutated_bytes(data, rng, self.most)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what it holds."""


class Envelopes(Target):
    """Envelopes: the first byte says how the rest becomes one."""

    name = "envelope"
    most = 8192

    def __init__(self) -> None:
        self._known = samples.dictionary()
        untrained = zstandard.ZstdCompressionDict(
            b"\x37\xa4\x30\xec" + (99).to_bytes(4, "little") * 40
        )
        self._limits = EnvelopeLimits(max_bytes=256 * 1024, max_packets=50)
        self._decoder = EnvelopeDecoder(self._limits, {77: self._known, 99: untrained})

    def seeds(self) -> Iterator[bytes]:
        data = samples.batch()
        for envelope in (samples.zstd_envelope(), samples.zstd_envelope(self._known)):
            yield b"\0" + envelope.SerializeToString()
        for how in range(1, 6):
            yield bytes([how]) + data
        compressor = zstandard.ZstdCompressor(write_checksum=True, level=19)
        yield b"\6" + compressor.compress(data)
        yield b"\6" + zstandard.compress(b"\0" * 2**24)
        yield b"\6" + zstandard.compress(b"\x0a\0" * 2**15)
        streaming = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        yield b"\6" + streaming.compress(data) + streaming.flush()
        yield b"\7" + data

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        head, rest = data[:1] or b"\0", data[1:]
        if rng.random() < 0.05:
            return bytes([rng.randrange(8)]) + rest
        if head == b"\0":
            return head + mutated(rest, wire_pb2.EncodedPackets, rng, self.most - 1)
        return head + mutated_bytes(rest, rng, self.most - 1)

    def __call__(self, data: bytes) -> None:
        envelope = self._envelope(data[0], data[1:]) if data else wire_pb2.EncodedPackets()
        if envelope is None:
            return
        try:
            self._decoder.refuse_too_large(envelope)
            packets = self._decoder.decode(envelope)
        except FMIError as error:
            assert_explained(error)
            return
        if (
            sum(map(len, packets)) > self._limits.max_bytes
            or len(packets) > self._limits.max_packets
        ):
            raise Finding("more came out than is taken")

    def _envelope(self, how: int, data: bytes) -> wire_pb2.EncodedPackets | None:
        if how == 0:
            try:
                return wire_pb2.EncodedPackets.FromString(data)
            except DecodeError:
                return None
        known = self._known if how in (2, 3) else None
        encoding, size, sent = wire_pb2.ENCODING_ZSTD, len(data), data
        match how:
            case 1 | 2:
                sent = zstandard.ZstdCompressor(dict_data=known).compress(data)
            case 3:
                known = zstandard.ZstdCompressionDict(data or b"0" * 8)
                sent = zstandard.ZstdCompressor(dict_data=known).compress(data)
                known = self._known
            case 4:
                sent = zstandard.compress(data)[: -1 - len(data) % 7]
            case 5:
                encoding = wire_pb2.ENCODING_IDENTITY
            case 6:  # a frame of the fuzzer's own; what it says of itself is believed
                try:
                    frame = zstandard.get_frame_parameters(data)
                except zstandard.ZstdError:
                    return None
                return wire_pb2.EncodedPackets(
                    encoding=encoding,
                    uncompressed_size=frame.content_size,
                    dictionary_id=frame.dict_id,
                    data=data,
                )
            case _:
                level = 1 + len(data) % 19
                sent = zstandard.ZstdCompressor(level=level, write_checksum=True).compress(data)
        return wire_pb2.EncodedPackets(
            encoding=encoding,
            uncompressed_size=size,
            dictionary_id=known.dict_id() if known else 0,
            data=sent,
        )


class PlainData(Target):
    """Plain data: a number of the packet to begin with, then a seed for each change made to it."""

    name = "coerce"
    most = 64

    def seeds(self) -> Iterator[bytes]:
        for number in range(len(samples.plain_packets())):
            yield bytes([number])
            yield bytes([number, *range(number, number + 12)])

    def __call__(self, data: bytes) -> None:
        first, *changes = data or b"\0"
        started = samples.plain_packets()
        plain: Any = started[first % len(started)]
        rng = random.Random(bytes(changes))
        for _ in range(min(len(changes), 12) // 2 + (len(changes) > 0)):
            plain = changed_plain(plain, rng)
        try:
            packet = _REGISTRY.coerce(plain)
        except FMIError as error:
            assert_explained(error)
        else:
            if not isinstance(packet, packet_pb2.Packet):
                raise Finding(f"coerced to {type(packet)}")
            packet.SerializeToString()
        valid, missing = _REGISTRY.validate(plain)
        if valid and missing:
            raise Finding("valid and yet something is missing")


class JsonPackets(Target):
    """Text of JSON."""

    name = "json"

    def seeds(self) -> Iterator[bytes]:
        for plain in samples.plain_packets():
            yield json.dumps(plain).encode()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated_bytes(data, rng, self.most)
        try:
            plain = changed_plain(json.loads(data), rng, json=True)
            return json.dumps(plain).encode()[: self.most]
        except (ValueError, TypeError, RecursionError):
            return mutated_bytes(data, rng, self.most)

    def __call__(self, data: bytes) -> None:
        try:
            plain = json.loads(data)
        except (ValueError, RecursionError):
            return
        try:
            _REGISTRY.coerce(plain)
        except FMIError as error:
            assert_explained(error)


class Packets(Target):
    """Serialised packets, through the contract, the cohorts' rules and the policy."""

    name = "packet"

    def __init__(self) -> None:
        cohorts = CohortRegistry(_REGISTRY)
        for spec in samples.specs():
            cohorts.declare(spec)
        validator = FMIValidator(_REGISTRY, cohorts=cohorts, clock=lambda: float(samples.NOW_S))
        self._intake = Intake(_REGISTRY, validator)

    def seeds(self) -> Iterator[bytes]:
        for packet in samples.packets():
            for cohort in ("free", "clinic", "strict", "private", "new/one"):
                packet.header.cohort = cohort
                yield packet.SerializeToString()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        return mutated(data, packet_pb2.Packet, rng, self.most)

    def __call__(self, data: bytes) -> None:
        (found,) = self._intake.inspect_many([data], received_at_us=samples.NOW_S * 1_000_000)
        if isinstance(found, Answer):
            if found.error is None:
                raise Finding("refused without an error")
            assert_explained(found.error)
            return
        again = packet_pb2.Packet.FromString(found.record.payload)
        if again != found.packet:
            raise Finding("what is stored is another packet")
        plain = packet_to_plain(again)
        try:
            back = _REGISTRY.coerce(plain)
        except FMIError as error:
            raise Finding(f"valid, but not as plain data: {error}") from error
        if packet_to_plain(back) != plain:
            raise Finding("plain data says something else")


def says_more(message: Message) -> bool:
    """Tell whether a message, or one in it, has a field that is not known."""
    if len(UnknownFieldSet(message)):
        return True
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts = value if isinstance(value, Sequence) else [value]
        if any(says_more(part) for part in parts):
            return True
    return False


class Specs(Target):
    """Serialised cohort specs, checked, declared, and changed to."""

    name = "spec"

    def __init__(self) -> None:
        self._cohorts = CohortRegistry(_REGISTRY, authenticated=True)
        for spec in samples.specs():
            self._cohorts.declare(spec)

    def seeds(self) -> Iterator[bytes]:
        for spec in samples.specs():
            yield spec.SerializeToString()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        return mutated(data, cohort_pb2.CohortSpec, rng, self.most)

    def __call__(self, data: bytes) -> None:
        try:
            spec = cohort_pb2.CohortSpec.FromString(data)
        except DecodeError:
            return
        violations = spec_violations(spec, _REGISTRY)
        for force in (False, True):
            try:
                rules, _ = self._cohorts.check(spec, force=force)
            except FMIError as error:
                assert_explained(error)
                if not force and error.reason == Reason.SPEC_CHANGE_UNSAFE:
                    continue
                if not violations and not says_more(spec):
                    raise Finding(f"refused, but breaks no rule: {error}") from error
                return
            if violations:
                raise Finding(f"taken, but breaks a rule: {violations[0]}")
            if says_more(spec):
                raise Finding("taken, and not all that it says is known")
            again, _ = self._cohorts.check(rules.spec, force=True)
            if again.schema_hash != rules.schema_hash:
                raise Finding("filled in twice it is another spec")


class SpecFiles(Target):
    """Text of cohort files."""

    name = "cohort-file"

    def seeds(self) -> Iterator[bytes]:
        for spec in samples.specs():
            plain = json_format.MessageToDict(spec, preserving_proto_field_name=True)
            yield yaml.safe_dump(plain).encode()
        yield b"name: care\nsignals:\n- &a {name: tau, section: controller, lower: 0, upper: 1.5}\n- *a\n"
        yield b"a: &a [x, x]\nb: &b [*a, *a]\nc: {<<: {d: *b}}\nname: !!str 1\nrelease: {min_interval: 1s}\n"
        yield b'name: "\\ud800"\nx: 2001-12-14t21:59:43.10-05:00\ny: 0b11\nz: 1:30:00\nw: !!binary YQ==\n'
        yield b"? {a: 1}\n: !!set {b}\nname: !!omap [a: 1]\n---\nname: b\n"
        yield b"signals: !!timestamp 2001-01-01\nx: !!int 0x1F\ny: !!float 1.5\nz: !!bool yes\n"

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            word = rng.choice(_YAML_WORDS)
            place = rng.randrange(len(data) + 1)
            return (data[:place] + word + data[place:])[: self.most]
        return mutated_bytes(data, rng, self.most)

    def __call__(self, data: bytes) -> None:
        try:
            content = parse_yaml(
                data.decode("utf-8", "surrogatepass" if data[:1] == b"?" else "ignore")
            )
        except YAMLTextError as error:
            if not str(error).isprintable() or len(str(error)) > 1000:
                raise Finding(f"not one line: {str(error)[:300]!r}") from error
            return
        except UnicodeDecodeError:
            return
        if not isinstance(content, dict):
            return
        spec, untranslated = read_cohort_spec(content)
        unreadable = [problem.field for problem in untranslated]
        for violation in spec_violations(spec, _REGISTRY, unreadable=unreadable):
            if not f"{violation.field}{violation.description}".isprintable():
                raise Finding(f"not one line: {violation!r}")
        for problem in untranslated:
            if not f"{problem.field}{problem.description}".isprintable():
                raise Finding(f"not one line: {problem!r}")
            if len(problem.description) > 1000:
                raise Finding("a long description")


_YAML_WORDS: Sequence[bytes] = (
    b"!!timestamp ", b"!!int ", b"!!float ", b"!!bool ", b"!!null ", b"!!binary ", b"!!set ", b"!!omap ",
    b"!!pairs ", b"!!map ", b"!!seq ", b"!!str ", b"!x ", b"!!python/name:os.system ", b"<<: ", b"*a", b"&a ",
    b"[" * 50, b"{" * 50, b"- " * 50, b"? ", b": ", b"\n", b'"\\ud800"', b"'", b"|\n", b"--- ", b"...",
    b"%YAML 1.2\n",
    b"1e999", b".nan", b".inf", b"0x", b"0b", b"9" * 5000, b"1:99:99", b"2001-99-99", b"~", b"\xe2\x80\xa8",
    b"signals: ", b"section: ", b"lower: ", b"release: ", b"min_interval: ", b"privacy: ", b"quantum: ",
)  # fmt: skip


class Subscriptions(Target):
    """Subscription requests: filters, starts, tokens and handovers."""

    name = "subscribe"

    def seeds(self) -> Iterator[bytes]:
        for method, request in samples.requests():
            if method == "Subscribe":
                yield request.SerializeToString()
        patterns = ["a/**/b", "***", "?*?*?", "**a*b**", "a/?", "*/*", "a*?b"]
        yield wire_pb2.SubscribeRequest(cohorts=patterns).SerializeToString()

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        message = wire_pb2.SubscribeRequest()
        if rng.random() < 0.3:
            try:
                message.MergeFromString(data)
            except DecodeError:
                return mutated_bytes(data, rng, self.most)
            pattern = "".join(rng.choice("ab/*?.*") for _ in range(rng.randrange(1, 14)))
            message.cohorts.append(pattern)
            return message.SerializeToString()[: self.most]
        return mutated(data, wire_pb2.SubscribeRequest, rng, self.most)

    def __call__(self, data: bytes) -> None:
        try:
            message = wire_pb2.SubscribeRequest.FromString(data)
        except DecodeError:
            return
        try:
            _REGISTRY.check_request(message, reason=Reason.INVALID_FILTER)
            request = FeedRequest.from_message(message, history_epoch="fmi-epoch", head=7)
        except FMIError as error:
            assert_explained(error)
            return
        for key in (*request.start, ("free", 1), ("a/b", 2)):
            request.after(key)
        if not (request.oldest_token is None or 0 <= request.oldest_token <= 7):
            raise Finding(f"a token past the history: {request.oldest_token}")
        for pattern in set(request.patterns[-2:]):
            matcher, expected = PatternSet((pattern,)), _as_regex(pattern)
            for name in _COHORTS:
                if matcher.match(name) != bool(expected.fullmatch(name)):
                    raise Finding(f"{pattern!r} and {name!r}")


_COHORTS = (
    "a", "b", "a/b", "a/a/b", "ab", "aab", "a.b", "a/ab", "ba/ab/ba", "free", "clinic", "aaaaab", "a/b/a/b",
)  # fmt: skip


def _as_regex(pattern: str) -> re.Pattern[str]:
    """The pattern in Python's own terms, which are slow on some but another man's work."""
    parts = re.findall(r"\*+|\?|[^*?]+", pattern)
    return re.compile("".join(map(_part, parts)), re.DOTALL)


def _part(part: str) -> str:
    if part[0] == "*":
        return ".*" if len(part) > 1 else "[^/]*"
    return "[^/]" if part == "?" else re.escape(part)


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (Envelopes, PlainData, JsonPackets, Packets, Specs, SpecFiles, Subscriptions)
}
