"""The FMI contract, generated from the .proto files beside this module."""
