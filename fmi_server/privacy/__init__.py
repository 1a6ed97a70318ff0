"""Differential privacy for a whole site's contribution: noise, and what it costs.

Integers and numbers in, integers and numbers out: no protobuf, no network, no clock.
"""
