"""Pure numpy statistics of FMI: from what sites sent to what a cohort can say.

No protobuf, no grpc, no clock, no global random state: arrays, dataclasses and `now` come in.

Map, lowest first:

- `quantiles`: Student's t, the normal, Wilson's bound.
- `selection`, `shares`: who survives the trimming; how the survivors share the vote.
- `estimates`, `certainty`: what an estimate says; its interval, and what its confidence means.
- `estimators`: `estimate`, robust location of every row of a signals x sites matrix.
- `transforms`: `SignalRule`, and the scale on which a signal is averaged.
- `trust`, `weights`: reputation from leave-one-out distances; weight of a site.
- `resident`, `vocabulary`, `prior`: `CohortMatrix`, the resident state of a cohort, and its releases.
- `policy`: which bundle of changes helped, or why nothing can be said.
- `pooling`, `graph`, `causal`: pooled causal edges, conflicts, cycles.
- `warm_start`: contexts per regime, initial values for a site and where they came from.
"""

from __future__ import annotations

from fmi_server.aggregation.causal import (
    CausalConsensus,
    CausalCycle,
    CausalPair,
    CausalSettings,
    CausalSummary,
    ConsensusEdge,
    UnpooledEdge,
    pool_causes,
)
from fmi_server.aggregation.estimates import Estimate, EstimateTable
from fmi_server.aggregation.estimators import (
    BELOW_QUORUM,
    MAX_MAGNITUDE,
    EstimatorName,
    EstimatorSettings,
    estimate,
    trim_count,
)
from fmi_server.aggregation.policy import (
    BundleAssessment,
    ParamValue,
    PolicyDecision,
    PolicyHint,
    PolicyOutcome,
    PolicySettings,
    bundle_key,
    decide_policy,
    outcome_deltas,
)
from fmi_server.aggregation.prior import (
    CohortMatrix,
    IgnoredValue,
    PriorRelease,
    PutReport,
    SignalInUse,
    UnitCells,
)
from fmi_server.aggregation.transforms import SignalRule, TransformName
from fmi_server.aggregation.trust import (
    START_REPUTATION,
    ReputationBook,
    TrustSettings,
    leave_one_out_z,
    site_scores,
)
from fmi_server.aggregation.vocabulary import IgnoredReason
from fmi_server.aggregation.warm_start import (
    ContextReport,
    InitValue,
    RegimeContext,
    SiteContext,
    SiteGroups,
    WarmStart,
    WarmStartRequest,
    describe_contexts,
    warm_start,
)

__all__ = [
    "BELOW_QUORUM",
    "MAX_MAGNITUDE",
    "START_REPUTATION",
    "BundleAssessment",
    "CausalConsensus",
    "CausalCycle",
    "CausalPair",
    "CausalSettings",
    "CausalSummary",
    "CohortMatrix",
    "ConsensusEdge",
    "ContextReport",
    "Estimate",
    "EstimateTable",
    "EstimatorName",
    "EstimatorSettings",
    "IgnoredReason",
    "IgnoredValue",
    "InitValue",
    "ParamValue",
    "PolicyDecision",
    "PolicyHint",
    "PolicyOutcome",
    "PolicySettings",
    "PriorRelease",
    "PutReport",
    "RegimeContext",
    "ReputationBook",
    "SignalInUse",
    "SignalRule",
    "SiteContext",
    "SiteGroups",
    "TransformName",
    "TrustSettings",
    "UnitCells",
    "UnpooledEdge",
    "WarmStart",
    "WarmStartRequest",
    "bundle_key",
    "decide_policy",
    "describe_contexts",
    "estimate",
    "leave_one_out_z",
    "outcome_deltas",
    "pool_causes",
    "site_scores",
    "trim_count",
    "warm_start",
]
