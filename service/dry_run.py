"""POST /finetune with `dry_run: true`: what a job would be like. Nothing is trained, and nothing stays.

`python -m trainer.dry_run` looks at the data and measures; it is killed at the deadline, and what it told until then is
answered. One at a time: each takes a core, and part of the device.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lm.config import load_config
from lm.errors import UserError
from service.errors import unavailable
from service.finetuning import JobSpec, check_options, find_start, in_words_of_client, job_columns, take_data
from service.jobs.job import Job, Progress, new_id
from service.jobs.policy import run_config
from service.jobs.trainer_process import CPU_NICENESS, trainer_environment
from service.schemas.dry_run import DiskAnswer, DryRunAnswer, MemoryAnswer, TimeAnswer
from service.services import Services
from trainer.config import RunConfig, TrainingOptions
from trainer.estimate import Precision, estimate_disk, estimate_memory
from trainer.plan import plan_run

FOLDER = ".dry_runs"

Parts = dict[str, dict[str, Any]]
"""What the process told, by the names in `trainer/dry_run.py`."""


async def dry_run(services: Services, spec: JobSpec) -> DryRunAnswer:
    """Raises UserError in the client's words, NotFoundError, and ApiError 503 while others are under way for too long."""
    try:
        async with asyncio.timeout(services.settings.dry_run_seconds):
            await services.dry_run_lock.acquire()
    except TimeoutError:
        raise unavailable("other dry runs are under way; try again", retry_after=10) from None
    try:
        return await _dry_run(services, spec)
    except UserError as error:
        raise in_words_of_client(error, spec.calls) from error
    finally:
        services.dry_run_lock.release()


async def _dry_run(services: Services, spec: JobSpec) -> DryRunAnswer:
    start = find_start(services, spec)
    check_options(services, spec)
    folder = services.settings.home / FOLDER
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # of a service that was killed
    try:
        taken = await take_data(services, spec, folder / "data")
        job = _job(job_columns(spec, start, taken))
        config = run_config(
            job,
            base=services.registry.base_folder(start.base),
            home=services.settings.home,
            start=start.entry,
        )
        parts = await _ask(config, folder, services.settings.dry_run_seconds)
        if (error := parts.get("error")) is not None:
            raise UserError(error["message"], param=error["param"])
        return _answer(services, spec, job, config, parts)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _job(columns: dict[str, Any]) -> Job:
    """One that is in no store."""
    return Job(
        id=new_id("ftjob-"),
        created_at=0,
        started_at=None,
        finished_at=None,
        attempt=1,
        pid=None,
        events_offset=0,
        cancel_requested=False,
        progress=Progress(),
        error=None,
        fine_tuned_model=None,
        **columns,
    )


async def _ask(config: RunConfig, folder: Path, deadline_s: float) -> Parts:
    """What the process finds out until the deadline. Raises ChildProcessError when it dies of something else."""
    await asyncio.to_thread(_write_config, config, folder)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "trainer.dry_run", str(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=16 << 20,
        env=trainer_environment(),
    )
    parts: Parts = {}
    try:
        os.setpriority(os.PRIO_PROCESS, process.pid, CPU_NICENESS)
        async with asyncio.timeout(deadline_s):
            assert process.stdout is not None
            async for line in process.stdout:
                part = json.loads(line)
                parts[part.pop("part")] = part
            if code := await process.wait():
                raise ChildProcessError(f"the dry run ended with exit code {code}")
    except (TimeoutError, ProcessLookupError):
        pass
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    return parts


def _write_config(config: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


# ---- the answer


def _answer(services: Services, spec: JobSpec, job: Job, config: RunConfig, parts: Parts) -> DryRunAnswer:
    data, steps, speed = parts.get("data"), parts.get("steps"), parts.get("speed", {})
    options = spec.options
    device, precision = _device_and_precision(services, options, speed)
    memory = _memory(config, options, device, precision, steps, speed)
    disk = _disk(services, config, options, precision, steps)
    time = _time(steps, speed)
    plan = services.arbiter.plan(job, memory.total)
    epochs = options.epochs if steps is None else steps["epochs"]
    return DryRunAnswer(
        model=job.model,
        start_from=job.start_from,
        recipe=options.recipe,
        config={
            **options.model_dump(mode="json"),
            "learning_rate": options.peak_learning_rate,
            "epochs": epochs,
        },
        notes=list(spec.notes),
        device=device,
        dtype=precision,
        dataset=None if data is None else {**data.pop("report"), **data},  # type: ignore[arg-type]
        steps=steps,  # type: ignore[arg-type]
        memory=memory,
        disk=disk,
        time=time,
        serving=plan.mode,
        serving_reason=plan.reason,
        is_complete={"data", "steps", "speed"} <= parts.keys(),
        problems=_problems(services, parts, memory, disk),
    )


def _device_and_precision(services: Services, options: TrainingOptions, speed: dict[str, Any]) -> tuple[str, Precision]:
    """As the process found them, else as they are likely to be."""
    ready = services.engine.ready
    served = services.settings.device if ready is None else ready.device
    device = speed.get("device") or (options.device if options.device != "auto" else served)
    guess = "fp32" if device in ("cpu", "auto") else "bf16"
    precision = speed.get("dtype") or (options.dtype if options.dtype != "auto" else guess)
    return device, "bf16" if precision == "bf16" else "fp32"


def _memory(
    config: RunConfig,
    options: TrainingOptions,
    device: str,
    precision: Precision,
    steps: dict[str, Any] | None,
    speed: dict[str, Any],
) -> MemoryAnswer:
    shape = load_config(Path(config.model))
    longest = min(options.max_seq_len, shape.max_position_embeddings)
    length = longest if steps is None else steps["longest_row"]
    estimate = estimate_memory(shape, options, precision=precision, length=length, device=device)
    total = speed.get("memory_total_bytes")
    return MemoryAnswer(
        **asdict(estimate),
        device_total=total,
        device_free=speed.get("memory_free_bytes"),
        fits=None if total is None else estimate.total <= total,
    )


def _disk(
    services: Services,
    config: RunConfig,
    options: TrainingOptions,
    precision: Precision,
    steps: dict[str, Any] | None,
) -> DiskAnswer:
    shape = load_config(Path(config.model))
    checkpoints = plan_run(options, 1).num_checkpoints if steps is None else steps["checkpoints"]
    estimate = estimate_disk(shape, options, precision=precision, num_checkpoints=checkpoints)
    free = shutil.disk_usage(services.settings.home).free
    return DiskAnswer(**asdict(estimate), free=free, fits=estimate.total <= free)


def _time(steps: dict[str, Any] | None, speed: dict[str, Any]) -> TimeAnswer | None:
    if steps is None or "seconds_per_step" not in speed:
        return None
    names = ("seconds_per_step", "trained_tokens_per_second", "processed_tokens_per_second")
    total = speed["seconds_per_step"] * steps["total_steps"]
    return TimeAnswer(**{name: speed[name] for name in names}, total_seconds=total)


def _problems(services: Services, parts: Parts, memory: MemoryAnswer, disk: DiskAnswer) -> list[str]:
    problems = []
    missing = [name for name in ("data", "steps", "speed") if name not in parts]
    if missing:
        seconds = services.settings.dry_run_seconds
        problems.append(f"not found out within dry_run_seconds ({seconds:g}): {', '.join(missing)}")
    if "problem" in parts.get("speed", {}):
        problems.append(f"the speed was not measured: {parts['speed']['problem']}")
    if memory.fits is False:
        problems.append(
            f"the device has {_gb(memory.device_total)}, and training takes about {_gb(memory.total)}: lower batch_size "
            "or max_seq_len, set enable_activation_checkpointing, or train an adapter (recipe lora)"
        )
    if not disk.fits:
        problems.append(
            f"the disk has {_gb(disk.free)} free, and the run writes up to {_gb(disk.total)}: set "
            "keep_last_n_checkpoints, or save less often"
        )
    return problems


def _gb(count: int | None) -> str:
    return f"{(count or 0) / 1e9:.1f} GB"
