"""The pipeline runs its steps in order, stops at the first that ends the request, and takes one more step easily."""

from __future__ import annotations

from dataclasses import replace

from router.admission.access import AccessRules
from router.admission.pipeline import Admission, AdmissionPipeline, AdmissionRequest, identify_client, read_terms
from router.domain.gpu import Gpu, GpuUuid
from router.errors import Forbidden
from router.http1.response_writer import LocalResponse
from router.llm_api.routes import RouteTable

_GPUS = {GpuUuid("GPU-aa"): Gpu(GpuUuid("GPU-aa"), 0, "first", 10, 10, 0)}


def _request(path: str = "/api/chat", **headers: str) -> AdmissionRequest:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return AdmissionRequest("POST", path, RouteTable().find(path), named.get, "192.0.2.7", 0)


def _add_cors(_: AdmissionRequest, admission: Admission) -> Admission:
    return replace(admission, cors_headers=(("Vary", "Origin"),))


def _require_key(_: AdmissionRequest, admission: Admission) -> Admission:
    if not admission.client_identity.client.startswith("key:"):
        raise Forbidden("an API key is required")
    return replace(admission, is_reusable=False)


def _respond(_: AdmissionRequest, admission: Admission) -> Admission:
    return replace(admission, response=LocalResponse(204, ()))


def test_a_further_step_sees_what_earlier_ones_decided_and_may_refuse() -> None:
    pipeline = AdmissionPipeline((identify_client(AccessRules()), _add_cors, _require_key))
    refused = pipeline.admit(_request())
    assert isinstance(refused.error, Forbidden)
    assert not refused.is_admitted
    assert refused.cors_headers == (("Vary", "Origin"),)
    admitted = pipeline.admit(_request(authorization="Bearer sk-1"))
    assert (admitted.is_admitted, admitted.is_reusable) == (True, False)


def test_nothing_runs_after_a_response() -> None:
    admission = AdmissionPipeline((_respond, _require_key)).admit(_request())
    assert admission.response == LocalResponse(204, ())
    assert admission.error is None


def test_an_admission_with_a_layout_is_not_reused_because_gpus_come_and_go() -> None:
    pipeline = AdmissionPipeline((identify_client(AccessRules()), read_terms(lambda: _GPUS)))
    assert pipeline.admit(_request(x_llamayard_priority="high")).is_reusable
    assert not pipeline.admit(_request(x_llamayard_layout="gpu:0")).is_reusable
    assert pipeline.admit(_request("/api/show", x_llamayard_layout="nonsense")).is_admitted
