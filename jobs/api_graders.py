"""Routes of graders: trying one on a text, and checking one without. Nothing is stored."""

import time
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from cluster.judge import allowed
from jobs.body import json_body
from jobs.caller import AsCaller, Caller, json_request
from peft_service.graders import Allowed, AnyGrader, Fault, Grader, Judge, Sample, check
from peft_service.variants import Frozen

router = APIRouter(prefix="/fine_tuning/alpha/graders")

NEVER = ("model_grader_refusal_error", "truncated_observation_error", "unresponsive_reward_error")
"""Faults that OpenAI's answer names and graders here do not tell apart."""


class RunGrader(Frozen):
    """A grader, and a text for it."""

    grader: AnyGrader
    model_sample: str
    """What a model has written: `{{sample.output_text}}`, and where it is JSON `{{sample.output_json}}`."""
    item: dict[str, Any] | None = None
    """The row of a data file that it answers: `{{item.…}}`."""


class ValidateGrader(Frozen):
    """A grader."""

    grader: AnyGrader


class GraderMetadata(BaseModel):
    name: str
    type: str
    errors: dict[str, Any]
    """By OpenAI's names, whether it went wrong, and details."""
    execution_time: float
    """Seconds."""
    scores: dict[str, float]
    """By grader."""
    token_usage: int | None = None
    sampled_model_name: str | None = None


class GraderRun(BaseModel):
    """What the grader says. Where it could not, `reward` is 0 and `metadata.errors` says why."""

    reward: float
    sub_rewards: dict[str, float]
    metadata: GraderMetadata
    model_grader_token_usage_per_model: dict[str, int] = {}


class GraderChecked(BaseModel):
    grader: dict[str, Any]
    """As it was understood."""


@router.post("/run", tags=["fine-tuning"], openapi_extra=json_request(RunGrader))
def run_grader(caller: AsCaller, wanted: Annotated[RunGrader, Depends(json_body(RunGrader))]) -> GraderRun:
    """Grade one text, as a reinforcement job or an evaluation would."""
    began = time.monotonic()
    with Judge(wanted.grader, allowed_here(caller)) as judge:
        (outcome,) = judge([wanted.item or {}], [Sample(wanted.model_sample)])
    errors: dict[str, Any] = {
        name: name == outcome.fault for name in (*filter(None, get_args(Fault)), *NEVER)
    }
    if outcome.fault in ("python_grader_runtime_error", "model_grader_server_error"):
        errors[f"{outcome.fault}_details"] = outcome.detail
    elif outcome.fault:
        errors["details"] = outcome.detail
    return GraderRun(
        reward=outcome.score,
        sub_rewards=dict(outcome.parts),
        metadata=GraderMetadata(
            name=wanted.grader.name,
            type=wanted.grader.type,
            errors=errors,
            execution_time=time.monotonic() - began,
            scores={wanted.grader.name: outcome.score, **outcome.parts},
        ),
    )


@router.post("/validate", tags=["fine-tuning"], openapi_extra=json_request(ValidateGrader))
def validate_grader(
    caller: AsCaller, wanted: Annotated[ValidateGrader, Depends(json_body(ValidateGrader))]
) -> GraderChecked:
    """Check a grader: its fields, templates, formula, script, and that this service can run it."""
    grader: Grader = wanted.grader
    check(grader, None, allowed_here(caller))
    return GraderChecked(grader=grader.model_dump(mode="json", exclude_none=True))


def allowed_here(caller: Caller) -> Allowed:
    """What the operator lets graders use."""
    settings = caller.settings
    return allowed(settings.python_graders, settings.judge_url, settings.judge_key)
