"""Whatever is sent, the gateway answers with less than 500: schemathesis makes requests, right and wrong, out of our own OpenAPI."""

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from stub_service import application

CASES = 300
answers: Counter[int] = Counter()
schema = schemathesis.openapi.from_asgi("/openapi.json", application())


@schema.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_is_answered_500(case: Any) -> None:
    answer = case.call()
    answers[answer.status_code] += 1
    assert answer.status_code < 500, (case.as_curl_command(), answer.text)
    if answer.status_code >= 400 and answer.status_code != 405:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_they_were_many_of_both_kinds() -> None:
    assert answers.total() >= 2000, answers
    assert answers[200] > 100 and answers[422] > 100, answers
