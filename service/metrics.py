"""What GET /metrics tells, in Prometheus' text form. vLLM's names and buckets for what vLLM has, `tuneserve:` else.

`model_name` is the base model: the checkpoint that answers changes with every fine-tuning, and is told by
`tuneserve:weights_info`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from service.engine.messages import EngineReady, FinishReason, RequestTiming, StepStats
from service.gate import Gate
from service.histogram import (
    INTER_TOKEN,
    ITERATION_TOKENS,
    LATENCY,
    PREEMPTIONS,
    SMALL_NUMBERS,
    TOKENS,
    TTFT,
    Histogram,
)
from service.jobs.job import Status
from service.rates import Rates

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

AbortCause = Literal["client", "engine", "shutdown", "error"]
SwapResult = Literal["succeeded", "failed"]
WaitReason = Literal["capacity", "deferred"]
TokenSource = Literal["local_compute", "local_cache_hit"]
MetricT = TypeVar("MetricT", Counter, Gauge)

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
"""vLLM's. Ours ends its process, and keeps nothing."""

FINISHED: dict[AbortCause, str] = {"client": "abort", "engine": "error", "error": "error"}
"""How an aborted answer is counted among the finished ones. What a shutdown cuts off is told as finished by itself."""

IDLE = StepStats(
    num_running=0,
    num_waiting=0,
    used_blocks=0,
    prefill_tokens=0,
    prefill_s=0.0,
    decode_tokens=0,
    decode_s=0.0,
    decode_bytes=0,
    device_memory_bytes=0,
)


class Metrics:
    """One registry for one service. Every label value that can occur is there from the start, at 0."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._peak_bandwidth = 0.0
        self._num_blocks = 0
        self._stats = IDLE
        """Of the last step: read when somebody asks, since steps come more often."""
        self._waiting_for_engine: Callable[[], int] = lambda: 0
        self._decode, self._prefill, self._bytes = Rates(), Rates(), Rates()
        self._define_engine()
        self._define_requests()
        self._define_ours()

    def _define_engine(self) -> None:
        running = self._vllm(Gauge, "num_requests_running", "Requests that the engine computes.")
        running.set_function(lambda: self._stats.num_running)
        waiting = self._vllm(Gauge, "num_requests_waiting", "Requests that wait to be computed.")
        waiting.set_function(lambda: self._stats.num_waiting + self._waiting_for_engine())
        by_reason = self._vllm_by(
            Gauge, "num_requests_waiting_by_reason", "The same, by what they wait for.", "reason", get_args(WaitReason)
        )
        by_reason["capacity"].set_function(lambda: self._stats.num_waiting - self._stats.num_deferred)
        by_reason["deferred"].set_function(lambda: self._stats.num_deferred + self._waiting_for_engine())
        cache_usage = self._vllm(Gauge, "kv_cache_usage_perc", "Used share of the KV cache; 1 is all of it.")
        cache_usage.set_function(lambda: self._stats.used_blocks / self._num_blocks if self._num_blocks else 0)
        self.cache_config = Gauge(
            "vllm:cache_config_info",
            "Size and form of the KV cache.",
            [*self._labels, "block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"],
            registry=self.registry,
        )
        self.prefix_queries = self._vllm(Counter, "prefix_cache_queries", "Prompt tokens that the cache was asked for.")
        self.prefix_hits = self._vllm(Counter, "prefix_cache_hits", "Those that it had.")
        self.preemptions = self._vllm(Counter, "num_preemptions", "Requests put back for want of cache blocks.")
        self.read_bytes = self._vllm(Counter, "estimated_read_bytes_per_gpu", "Bytes that decoding read.")
        self.iteration = self._histogram(
            "iteration_tokens_total", "Tokens per engine step, prompts included.", ITERATION_TOKENS
        )

    def _define_requests(self) -> None:
        self.prompt_tokens = self._vllm(Counter, "prompt_tokens", "Prompt tokens of requests that got a token.")
        self.cached_tokens = self._vllm(Counter, "prompt_tokens_cached", "Those that were in the cache.")
        self.prompt_sources = self._vllm_by(
            Counter, "prompt_tokens_by_source", "The same, by where they came from.", "source", get_args(TokenSource)
        )
        self.generation_tokens = self._vllm(Counter, "generation_tokens", "Generated tokens.")
        self.success = self._vllm_by(
            Counter, "request_success", "Finished requests.", "finished_reason", (*get_args(FinishReason), "error")
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "Request to first token.", TTFT)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Token to next token.", INTER_TOKEN)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a request.", INTER_TOKEN
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Request to last token.", LATENCY)
        self.phases = {
            name: self._histogram(f"request_{name}_time_seconds", f"Time of the {name} phase.", LATENCY)
            for name in ("queue", "prefill", "decode", "inference")
        }
        self._define_sizes()

    def _define_sizes(self) -> None:
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request.", TOKENS)
        self.request_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens per request that the cache did not have.", TOKENS
        )
        self.request_generation = self._histogram("request_generation_tokens", "Generated tokens per request.", TOKENS)
        self.longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of the answers to one prompt.", TOKENS
        )
        self.max_tokens = self._histogram("request_params_max_tokens", "max_tokens of requests.", TOKENS)
        self.params_n = self._histogram("request_params_n", "Answers asked for to one prompt.", SMALL_NUMBERS)
        self.request_preemptions = self._histogram(
            "request_num_preemptions", "How often a request was put back.", PREEMPTIONS
        )

    def _define_ours(self) -> None:
        self._rate("decode_tokens_per_second", "Generated tokens per second of decoding.", self._decode.rate)
        self._rate("prefill_tokens_per_second", "Prompt tokens per second of prefilling.", self._prefill.rate)
        self._rate("bandwidth_bytes_per_second", "Bytes read per second of decoding.", self._bytes.rate)
        self._rate("bandwidth_utilization_ratio", "Share of the device's peak bandwidth.", self._utilization)
        memory = self._ours(Gauge, "device_memory_bytes", "Device memory that the engine holds.")
        memory.set_function(lambda: self._stats.device_memory_bytes)
        self.weights = self._ours(Gauge, "weights_info", "The served weights.", ["model", "weights_hash"])
        self.swaps = self._ours(Counter, "weights_swaps", "Changes of the served weights.", ["result"])
        self.swap_seconds = Histogram(
            "tuneserve:weights_swap_seconds", "Time of a change of weights.", TTFT, labels={}, registry=self.registry
        )
        self.sleep_seconds = Histogram(
            "tuneserve:engine_sleep_seconds",
            "Time for which the engine left its device to a trainer, until it served again.",
            LATENCY,
            labels={},
            registry=self.registry,
        )
        self.aborted = self._ours(Counter, "requests_aborted", "Requests that ended without an answer.", ["cause"])
        self.job_counts = self._ours(Gauge, "jobs", "Fine-tuning jobs.", ["status"])
        self.train_loss = self._ours(Gauge, "train_loss", "Loss of the newest training step.")
        self.train_step = self._ours(Gauge, "train_step", "The newest training step.")
        self.train_tokens = self._ours(Gauge, "train_tokens_per_second", "Speed of the newest training step.", ["kind"])
        for metric, values in (
            (self.swaps, get_args(SwapResult)),
            (self.aborted, get_args(AbortCause)),
            (self.job_counts, get_args(Status)),
            (self.train_tokens, ("trained", "processed")),
        ):
            for value in values:
                metric.labels(value)

    def watch(self, gate: Gate) -> None:
        """Tell of the engine's sleep, in the states of vLLM, and of the requests that wait for its end."""
        state = self._vllm_by(Gauge, "engine_sleep_state", "1 for the state it is in.", "sleep_state", SLEEP_STATES)
        state["awake"].set_function(lambda: float(gate.is_open))
        state["weights_offloaded"].set(0)
        state["discard_all"].set_function(lambda: float(gate.phase in ("asleep", "waking")))
        self._waiting_for_engine = lambda: gate.num_waiting

    def woke(self, seconds: float) -> None:
        self.sleep_seconds.observe(seconds)

    # ---- the engine

    def engine_ready(self, ready: EngineReady) -> None:
        self._peak_bandwidth = ready.peak_bandwidth
        self._num_blocks = ready.num_blocks
        self.cache_config.clear()
        self.cache_config.labels(
            **self._labels,
            block_size=ready.block_size,
            num_gpu_blocks=ready.num_blocks,
            cache_dtype=ready.dtype,
            enable_prefix_caching=True,
        ).set(1)

    def engine_gone(self) -> None:
        """Nothing runs where there is no engine."""
        self._stats = IDLE

    def step(self, stats: StepStats) -> None:
        self._stats = stats
        for counter, number in (
            (self.prefix_queries, stats.num_prefix_queries),
            (self.prefix_hits, stats.num_prefix_hits),
            (self.preemptions, stats.num_preempted),
            (self.read_bytes, stats.decode_bytes),
        ):
            if number:  # a counter takes longer to add to than all the rest here
                counter.inc(number)
        self._decode.add(stats.decode_tokens, stats.decode_s)
        self._prefill.add(stats.prefill_tokens, stats.prefill_s)
        self._bytes.add(stats.decode_bytes, stats.decode_s)
        if tokens := stats.prefill_tokens + stats.num_prefix_hits + stats.num_sampled:
            self.iteration.observe(tokens)

    # ---- requests: each of the n answers to a prompt is one

    def first_token(self, prompt_tokens: int, seconds: float, *, cached_tokens: int = 0) -> None:
        """Of one answer; `cached_tokens` of its prompt were not computed."""
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)
        self.prompt_sources["local_cache_hit"].inc(cached_tokens)
        self.prompt_sources["local_compute"].inc(prompt_tokens - cached_tokens)
        self.ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self.inter_token.observe(seconds)

    def request_finished(
        self,
        reason: FinishReason,
        *,
        prompt_tokens: int,
        generated_tokens: int,
        max_tokens: int,
        seconds: float,
        timing: RequestTiming | None,
        cached_tokens: int = 0,
    ) -> None:
        self.success[reason].inc()
        self.request_prompt.observe(prompt_tokens)
        self.request_computed.observe(prompt_tokens - cached_tokens)
        self.request_generation.observe(generated_tokens)
        self.max_tokens.observe(max_tokens)
        self.e2e.observe(seconds)
        if timing is None:
            return
        self.phases["queue"].observe(timing.queue_s)
        self.phases["prefill"].observe(timing.prefill_s)
        self.phases["decode"].observe(timing.decode_s)
        self.phases["inference"].observe(timing.prefill_s + timing.decode_s)
        self.request_preemptions.observe(timing.num_preempted)
        if generated_tokens > 1:
            self.per_token.observe(timing.decode_s / (generated_tokens - 1))

    def prompt_finished(self, *, n: int, longest_answer: int) -> None:
        """All `n` answers to a prompt are complete; the longest has so many tokens."""
        self.params_n.observe(n)
        self.longest.observe(longest_answer)

    def request_aborted(self, cause: AbortCause) -> None:
        """An answer ended without being complete, in whichever phase it was."""
        self.aborted.labels(cause).inc()
        if (reason := FINISHED.get(cause)) is not None:
            self.success[reason].inc()

    # ---- jobs and weights

    def serving(self, model: str, weights_hash: str) -> None:
        self.weights.clear()
        self.weights.labels(model, weights_hash).set(1)

    def swap(self, result: SwapResult, seconds: float) -> None:
        self.swaps.labels(result).inc()
        self.swap_seconds.observe(seconds)

    def jobs(self, counts: Mapping[str, int]) -> None:
        for status in get_args(Status):
            self.job_counts.labels(status).set(counts.get(status, 0))

    def job_step(self, event: Mapping[str, Any]) -> None:
        """Take a `step` event of a trainer."""
        self.train_loss.set(event["loss"])
        self.train_step.set(event["step"])
        self.train_tokens.labels("trained").set(event["trained_tokens_per_second"])
        self.train_tokens.labels("processed").set(event["processed_tokens_per_second"])

    def render(self) -> bytes:
        return generate_latest(self.registry)

    # ---- how they are made

    def _vllm(self, kind: type[MetricT], name: str, documentation: str) -> MetricT:
        return kind(f"vllm:{name}", documentation, list(self._labels), registry=self.registry).labels(**self._labels)

    def _vllm_by(
        self, kind: type[MetricT], name: str, documentation: str, label: str, values: Sequence[str]
    ) -> dict[str, MetricT]:
        metric = kind(f"vllm:{name}", documentation, [*self._labels, label], registry=self.registry)
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", documentation, buckets, labels=self._labels, registry=self.registry)

    def _ours(self, kind: type[MetricT], name: str, documentation: str, labels: list[str] | None = None) -> MetricT:
        return kind(f"tuneserve:{name}", documentation, labels or [], registry=self.registry)

    def _rate(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        self._ours(Gauge, name, documentation).set_function(read)

    def _utilization(self) -> float:
        return self._bytes.rate() / self._peak_bandwidth if self._peak_bandwidth else 0.0
