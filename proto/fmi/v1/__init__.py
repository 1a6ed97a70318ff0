"""Contract package ``fmi.v1``: ``from fmi.v1 import packet_pb2``."""
