"""Whether the service lives, whether it answers, what it is, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from service import __version__
from service.errors import unavailable
from service.gate import Gate
from service.metrics import CONTENT_TYPE
from service.services import Services, ServicesDep

router = APIRouter(tags=["Service"])


@router.get("/health")
async def health(services: ServicesDep) -> dict[str, Any]:
    """200 as long as this process lives; how the engine is, is in the body."""
    engine, serving = services.engine, services.serving
    return {
        "status": "draining" if services.admission.draining else "ok",
        "version": __version__,
        "engine": {"state": engine.state, "restarts": engine.restarts, **_device(services)},
        "sleep": _sleep(services.serving.gate),
        "model": None if serving.served is None else serving.served.id,
        "loaded_models": list(serving.loaded),
        "problems": serving.problems,
    }


@router.get("/ready")
async def ready(services: ServicesDep) -> dict[str, str]:
    """200 when a request would be answered at once, also while new weights are swapped in; else 503."""
    if not services.is_ready:
        what, retry_after = f"the engine is {services.engine.state}", 1
        if services.admission.draining:
            what = "the service is stopping"
        elif services.is_asleep:
            what, retry_after = services.serving.gate.reason, services.serving.gate.retry_after
        raise unavailable(f"not ready: {what}; GET /health says more", retry_after=retry_after)
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=Response)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    if services.engine.ready is None:
        services.metrics.engine_gone()
    if (served := services.serving.served) is not None:
        services.metrics.serving(served.id, services.serving.weights_hash(served.id))
    return Response(services.metrics.render(), media_type=CONTENT_TYPE)


def _sleep(gate: Gate) -> dict[str, Any] | None:
    """None while the engine is awake."""
    if gate.is_open:
        return None
    return {
        "phase": gate.phase,
        "reason": gate.reason,
        "since": None if gate.since is None else int(gate.since),
        "retry_after_s": gate.retry_after,
        "waiting_requests": gate.num_waiting,
    }


def _device(services: Services) -> dict[str, Any]:
    """What the engine chose when it started, and why."""
    ready = services.engine.ready
    if ready is None:
        return {}
    return {
        "device": ready.device,
        "device_name": ready.device_name,
        "device_reason": ready.device_reason,
        "dtype": ready.dtype,
        "dtype_reason": ready.dtype_reason,
        "ops": ready.ops,
        "max_model_len": ready.max_model_len,
        "max_num_seqs": ready.max_num_seqs,
        "kv_cache_tokens": ready.num_blocks * ready.block_size,
        "torch_version": ready.torch_version,
    }
