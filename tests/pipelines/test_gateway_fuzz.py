"""Whatever is sent, the gateway answers with less than 500: schemathesis makes requests, right and wrong, out of our own OpenAPI."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from stub_service import application

FEW, MANY = 25, 300
"""requests to each path that hypothesis makes; schemathesis adds those at the edges of every field"""
answers: Counter[int] = Counter()
schema = schemathesis.openapi.from_asgi("/openapi.json", application())


def ask(case: Any) -> None:
    answer = case.call()
    answers[answer.status_code] += 1
    assert answer.status_code < 500, (case.as_curl_command(), answer.text)
    if answer.status_code >= 400 and answer.status_code != 405:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@schema.parametrize()
@settings(max_examples=FEW, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_answered_500(case: Any) -> None:
    ask(case)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))
def test_nor_is_one_of_many(case: Any) -> None:
    ask(case)


@pytest.mark.slow
def test_they_were_many_of_both_kinds() -> None:
    assert answers.total() >= 2000, answers
    assert answers[200] > 100 and answers[422] > 100, answers
