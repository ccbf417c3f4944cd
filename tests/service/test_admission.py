from __future__ import annotations

import pytest

from service.admission import Admission
from service.errors import ApiError


def test_places_are_held_and_given_back() -> None:
    admission = Admission(3)
    with admission.enter(2), admission.enter(1):
        assert admission.active == 3
        with pytest.raises(ApiError) as caught, admission.enter(1):
            pass
        assert (caught.value.status_code, caught.value.code) == (429, "overloaded")
    assert admission.active == 0


def test_places_are_given_back_by_a_request_that_fails() -> None:
    admission = Admission(1)
    with pytest.raises(ZeroDivisionError), admission.enter(1):
        raise ZeroDivisionError
    assert admission.active == 0


def test_one_request_may_be_larger_than_the_limit_when_it_is_alone() -> None:
    admission = Admission(1)
    with admission.enter(5):
        assert admission.active == 5


def test_nothing_starts_while_the_service_drains_and_what_runs_goes_on() -> None:
    admission = Admission(3)
    with admission.enter(1):
        admission.draining = True
        with pytest.raises(ApiError) as caught, admission.enter(1):
            pass
        assert caught.value.status_code == 503
        assert admission.active == 1
