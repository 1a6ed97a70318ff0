"""Packets, and local privacy for them, that tests share."""

from __future__ import annotations

from fmi_client import FMIEmitter, LocalPrivacy, SignalBounds

__all__ = ["BOUNDS", "WIDE", "build", "plain", "private", "wire"]

BOUNDS = {"tau": (0.5, 1.0), "gain": (-1.0, 3.0)}
WIDE = {
    name: SignalBounds(*bounds, limits=(-1e12, 1e12))  # no two draws end at the same place
    for name, bounds in BOUNDS.items()
}


def private(bounds=WIDE, **options):
    return LocalPrivacy(bounds, **{"epsilon": 8.0, "delta": 1e-6, "emissions": 8, **options})


def build(tau=0.9, gain=0.5, **more):
    return FMIEmitter("site_001", cohort="care").emit_msp(
        metrics={"gain": gain}, controller={"tau": tau}, **more
    )


def plain(packet_id=None, tau=0.9):
    data = {"type": "msp", "metrics": {"gain": 0.5}, "controller": {"tau": tau}}
    return data if packet_id is None else {**data, "packet_id": packet_id}


def wire(packet):
    return packet.SerializeToString(deterministic=True)
