"""What broken rules of the contract say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor

from fmi.rules import ContractRules
from fmi.v1 import (
    admin_service_pb2,
    cohort_pb2,
    interchange_service_pb2,
    packet_pb2,
    registry_service_pb2,
)


@pytest.fixture(scope="module")
def rules() -> ContractRules:
    return ContractRules()


def fields() -> Iterator[FieldDescriptor]:
    for module in (
        admin_service_pb2,
        cohort_pb2,
        interchange_service_pb2,
        packet_pb2,
        registry_service_pb2,
    ):
        for message in module.DESCRIPTOR.message_types_by_name.values():
            yield from message.fields


def patterned(field: FieldDescriptor) -> bool:
    told = field.GetOptions().Extensions[validate_pb2.field]
    return bool(
        told.string.pattern or told.repeated.items.string.pattern or told.map.keys.string.pattern
    )


def with_a_line_break(field: FieldDescriptor):
    """A message whose one field has a text that no pattern of the contract allows."""
    message = field.containing_type._concrete_class()
    value = getattr(message, field.name)
    if field.type == FieldDescriptor.TYPE_STRING and isinstance(value, str):
        setattr(message, field.name, "a\n")
    elif hasattr(value, "append"):
        value.append("a\n")
    elif field.message_type.fields_by_name["value"].message_type:
        value["a\n"].SetInParent()
    else:
        value["a\n"] = 1
    return message


@pytest.mark.parametrize(
    "field", [pytest.param(f, id=f.full_name) for f in fields() if patterned(f)]
)
def test_a_broken_pattern_is_told_in_words(rules, field):
    told = [
        problem.description
        for problem in rules.problems(with_a_line_break(field))
        if problem.rule_id == "string.pattern" and problem.field.startswith(field.name)
    ]
    assert len(told) == 1
    assert told[0].removeprefix("the name ").startswith("must ")
    assert "^" not in told[0]


def test_a_cohort_in_capitals_is_told_what_a_cohort_may_be(rules):
    (problem,) = rules.problems(cohort_pb2.CohortSpec(name="HealthCare"))
    assert problem.description == (
        "must have only lower-case letters a-z, digits and . _ -, in parts joined by /, "
        "each beginning with a letter or a digit"
    )


def test_an_unknown_choice_is_told_those_that_there_are(rules):
    spec = cohort_pb2.CohortSpec(name="care")
    spec.aggregation.metrics_aggregation = "mode"
    (problem,) = rules.problems(spec)
    assert problem.description.startswith("must be in list [trimmed_mean, weighted_mean, ")
