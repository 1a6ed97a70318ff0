"""Generate the Python code of the contract, or check that it is up to date.

Run it with the interpreter of the generation environment (`make proto` does): the toolchain is pinned in
`requirements/proto.txt` to the oldest supported one, because generated code sets the floor for the
protobuf and grpcio versions that users may have.

The protovalidate rules are an import of the contract. Their descriptor ships inside the protovalidate
wheel, so that nothing has to be fetched: it is handed to protoc as a descriptor set.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def _validate_descriptor_set() -> bytes:
    """Return a FileDescriptorSet with `buf/validate/validate.proto`, taken from the wheel."""
    file = descriptor_pb2.FileDescriptorProto.FromString(validate_pb.desc().proto.to_binary())
    return descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString(deterministic=True)


def _run_protoc(*arguments: str) -> None:
    # The plugins stand beside the interpreter, whether or not the environment is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    status = protoc.main(["protoc", *arguments])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")


def _well_known_types() -> Path:
    return Path(str(files("grpc_tools") / "_proto"))


def generate(destination: Path) -> None:
    """Write the generated modules of the contract and of its rules under `destination`."""
    with tempfile.TemporaryDirectory() as scratch:
        everything = Path(scratch) / "all.binpb"
        rules = Path(scratch) / "rules.binpb"
        _write_rules(rules, scratch)
        contract = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("fmi/**/*.proto"))
        _run_protoc(
            f"-I{PROTO}",
            f"-I{_well_known_types()}",
            f"--descriptor_set_in={rules}",
            "--include_imports",
            "--include_source_info",  # the comments become docstrings in the typed stubs
            f"--descriptor_set_out={everything}",
            *contract,
        )
        outputs = (f"--python_out={destination}", f"--mypy_out=quiet:{destination}")
        _run_protoc(
            f"--descriptor_set_in={everything}",
            *outputs,
            f"--grpc_python_out={destination}",
            f"--mypy_grpc_out=quiet,only_async:{destination}",
            *contract,
        )
        _run_protoc(f"--descriptor_set_in={everything}", *outputs, "buf/validate/validate.proto")
    for empty in destination.rglob("*_pb2_grpc.py*"):
        if "_service" not in empty.name:
            empty.unlink()


def _write_rules(rules: Path, scratch: str) -> None:
    raw = Path(scratch) / "validate.binpb"
    raw.write_bytes(_validate_descriptor_set())
    known = Path(scratch) / "known.binpb"
    _run_protoc(
        f"-I{_well_known_types()}",
        f"--descriptor_set_out={known}",
        "--include_imports",
        "google/protobuf/descriptor.proto",
        "google/protobuf/duration.proto",
        "google/protobuf/field_mask.proto",
        "google/protobuf/timestamp.proto",
    )
    merged = descriptor_pb2.FileDescriptorSet.FromString(known.read_bytes())
    merged.MergeFromString(raw.read_bytes())
    rules.write_bytes(merged.SerializeToString(deterministic=True))


def write_image(path: Path) -> None:
    """Write the contract with its imports and comments as an image for buf."""
    with tempfile.TemporaryDirectory() as scratch:
        rules = Path(scratch) / "rules.binpb"
        _write_rules(rules, scratch)
        path.parent.mkdir(parents=True, exist_ok=True)
        _run_protoc(
            f"-I{PROTO}",
            f"-I{_well_known_types()}",
            f"--descriptor_set_in={rules}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={path}",
            *sorted(str(file.relative_to(PROTO)) for file in PROTO.glob("fmi/**/*.proto")),
        )


def _generated_files(root: Path) -> set[Path]:
    return {
        path.relative_to(root)
        for path in root.rglob("*")
        if path.is_file() and path.name.endswith(GENERATED_SUFFIXES)
    }


def differences(fresh: Path) -> list[str]:
    """List the generated files in the tree that differ from those under `fresh`."""
    expected, present = _generated_files(fresh), _generated_files(PROTO)
    found = [f"missing: {path}" for path in sorted(expected - present)]
    found += [f"left over: {path}" for path in sorted(present - expected)]
    found += [
        f"differs: {path}"
        for path in sorted(expected & present)
        if not filecmp.cmp(fresh / path, PROTO / path, shallow=False)
    ]
    return found


def main() -> int:
    """Generate into the tree, or compare (`--check`), or write an image for buf (`--image`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument("--image", type=Path, help="write an image with comments to this file")
    options = parser.parse_args()
    if options.image:
        write_image(options.image)
        return 0
    if not options.check:
        generate(PROTO)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        found = differences(Path(scratch))
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print("run `make proto` and commit the result", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
