"""`fmi contract`."""

from __future__ import annotations

import json

import pytest
from google.protobuf import descriptor_pb2

from fmi.descriptors import contract_hash, descriptor_set
from fmi.v1 import registry_service_pb2


def contract(**changes):
    told = {
        "revision": 1,
        "oldest_supported_revision": 1,
        "contract_hash": contract_hash(),
        "server_version": "9.9",
    }
    return registry_service_pb2.GetContractResponse(**{**told, **changes})


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({}, 0, "speak the same contract"),
        ({"contract_hash": "0" * 64}, 1, "the text is not"),
        ({"revision": 2, "contract_hash": "0" * 64}, 0, "takes 1 too"),
        ({"revision": 9, "oldest_supported_revision": 8}, 1, "upgrade this site"),
        ({"revision": 0, "oldest_supported_revision": 0}, 1, "upgrade the server"),
    ],
)
def test_contract_says_whether_the_two_agree(ask, script, changes, code, told):
    script["GetContract"] = contract(**changes)
    result = ask("contract")
    assert result.exit_code == code
    assert told in result.stdout
    assert contract_hash() in result.stdout
    data = json.loads(ask("contract", "--json").stdout)
    assert data["agree"] is (code == 0)
    assert data["server"]["version"] == "9.9"


def test_contract_writes_the_descriptors(ask, script, fmi, tmp_path):
    script["GetContract"] = lambda request: contract(
        descriptors=descriptor_set() if request.include_descriptors else b""
    )
    file = tmp_path / "fmi.binpb"
    assert ask("contract", "--descriptors", str(file)).exit_code == 0
    files = descriptor_pb2.FileDescriptorSet.FromString(file.read_bytes()).file
    assert "fmi/v1/packet.proto" in {f.name for f in files}
    assert ask("contract", "--descriptors", "-").stdout_bytes == descriptor_set()
    assert fmi("contract", "--local", "--descriptors", str(tmp_path / "x" / "y")).exit_code == 1
    assert fmi("contract", "--local", "--descriptors", str(file), "--json").exit_code == 0
