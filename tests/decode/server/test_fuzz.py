"""Whatever a body holds, the answer is never a 5xx, and the engine goes on."""

import json

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode.server.protocol import ChatRequest, CompletionRequest
from decode.server.responses import ResponsesRequest
from tests.decode.server.test_app import TOOL, Made, say, serving

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from(["required", "auto", "system", "tool", "function", "json_schema", "\ud800"]),
)  # fmt: skip
KEYS = st.sampled_from(
    ["type", "role", "content", "name", "function", "arguments", "tool_calls", "text", "schema",
     "json_schema", "json", "regex", "choice", "input", "x", "enable_thinking", "65", "call_id"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
ROUTES = {
    "/v1/chat/completions": (ChatRequest, {"messages": say("x"), "tools": [TOOL]}),
    "/v1/completions": (CompletionRequest, {"prompt": "x"}),
    "/v1/responses": (ResponsesRequest, {"input": "x"}),
}


@pytest.fixture(scope="module")
def server():
    made = Made()
    with serving(made) as (url, link), httpx.Client(base_url=url, timeout=120) as client:
        yield client, link, made


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("path", sorted(ROUTES))
@given(data=st.data())
def test_no_body_breaks_the_server(server, path, data):
    client, link, made = server
    model, valid = ROUTES[path]
    names = st.sampled_from(sorted(model.model_fields))
    body = {**valid, **data.draw(st.dictionaries(names, VALUES, max_size=3))}
    answer = client.post(path, content=json.dumps(body),
                         headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"]["message"], str)
    elif body.get("stream"):
        assert '"error"' not in answer.text
    assert link.restarts == 0 and len(made.engines) == 1
    assert client.post("/v1/completions", json={"prompt": "say:ok"}).status_code == 200
