from __future__ import annotations

import numpy as np

from service.engine.random_numbers import stream_key, uniforms


def numbers(seed: int, choice: int, positions: range) -> list[float]:
    keys = np.full(len(positions), stream_key(seed, choice), dtype=np.uint64)
    drawn: list[float] = uniforms(keys, np.array(positions, dtype=np.int32)).tolist()
    return drawn


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, from its reference implementation."""
    golden, state = 0x9E3779B97F4A7C15, 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    keys = np.array([state + i * golden & (1 << 64) - 1 for i in range(3)], dtype=np.uint64)
    drawn = uniforms(keys, np.zeros(3, dtype=np.int32))
    assert drawn.tolist() == [((value >> 41) + 0.5) / (1 << 23) for value in expected]


def test_numbers_depend_on_seed_choice_and_position_and_stay_inside() -> None:
    drawn = [
        number
        for seed in (-(2**63), -1, 0, 1, 2**63 - 1)
        for choice in (0, 1, 127)
        for number in numbers(seed, choice, range(500))
    ]
    assert len(set(drawn)) > 7490
    assert 0 < min(drawn) < max(drawn) < 1
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.01


def test_a_number_is_the_same_alone_and_in_an_array() -> None:
    together = numbers(7, 3, range(100, 200))
    assert together == [numbers(7, 3, range(position, position + 1))[0] for position in range(100, 200)]


def test_the_largest_number_is_below_one_in_fp32() -> None:
    largest = np.float32(1 - 0.5 / (1 << 23))
    totals = np.array([1, 1.5, 2, 3, 1000], dtype=np.float32)
    totals = np.concatenate((totals, np.nextafter(totals, np.float32(np.inf))))
    assert (totals * largest < totals).all()
