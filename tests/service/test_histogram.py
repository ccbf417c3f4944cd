from __future__ import annotations

import random

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from service.histogram import Histogram

BUCKETS = (0.01, 0.5, 1, 20)


def test_it_says_what_the_library_says_of_the_same_values() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("a:b_seconds", "Something.", BUCKETS, labels={"model_name": 'a"b', "engine": "0"}, registry=ours)
    peer = prometheus_client.Histogram(
        "a:b_seconds", "Something.", ["model_name", "engine"], buckets=BUCKETS, registry=theirs
    ).labels('a"b', "0")
    values = [0.01, 0.0100001, 1, 20, 21, 0, *(random.Random(0).expovariate(1) for _ in range(200))]
    for value in values:
        mine.observe(value)
        peer.observe(value)
    assert without_times(generate_latest(ours)) == without_times(generate_latest(theirs))
    assert b"a:b_seconds_created" in generate_latest(ours)


def without_times(text: bytes) -> list[str]:
    return [line for line in text.decode().splitlines() if not line.startswith("a:b_seconds_created")]
