"""Attacks from the network on a real server, and what an honest site feels of them."""
