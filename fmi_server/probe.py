"""`python -m fmi_server.probe HOST:PORT`: ask a server whether it is well, and exit with 0 if so.

For what looks after a container. It asks the port of `health_listen`, which needs no credentials, and loads
little: it is started again for every look. `fmi doctor` says more, to people.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2

__all__ = ["main"]

_PATIENCE_S: Final = 3.0
_OPTIONS: Final = (("grpc.enable_http_proxy", 0),)


def main(arguments: Sequence[str]) -> int:
    """Ask once; say in a line what is not well.

    Args:
        arguments: The address, and the name of a service of which to ask; the server as a whole where there
            is none.

    Returns:
        0: it serves. 1: it does not, or does not answer within three seconds. 2: the arguments are wrong.
    """
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python -m fmi_server.probe HOST:PORT [SERVICE]\n")
        return 2
    target, service = arguments[0], arguments[1] if len(arguments) == 2 else ""
    with grpc.insecure_channel(target, options=_OPTIONS) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            status = check(
                health_pb2.HealthCheckRequest(service=service), timeout=_PATIENCE_S
            ).status
        except grpc.RpcError as error:
            code = getattr(
                error, "code", None
            )  # what is raised is a call too, which its type hides
            told = code().name if code else str(error)
            sys.stderr.write(f"{target} does not say whether it is well: {told}\n")
            return 1
    if status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        sys.stderr.write(f"{target} is up and does not serve: {name}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
