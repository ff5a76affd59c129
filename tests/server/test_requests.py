"""Request ids and the access log."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest
from asgi_stubs import Connection, Echo, Gate, client, drive

from rkv_vllm.server.access_log import AccessLog
from rkv_vllm.server.auth import ApiKeys, Authentication
from rkv_vllm.server.request_id import RequestId

KEY = "sk-secret-" + "k" * 40


@pytest.mark.parametrize("given", ["abc-123", "a.b:c_D", "x" * 128])
def test_a_clients_request_id_goes_in_and_comes_back(given: str) -> None:
    """vLLM finds it in the header, other middlewares in the state, the client in the answer."""

    async def test() -> None:
        async with client(RequestId(Echo())) as http:
            answer = await http.get("/v1/models", headers={"X-Request-ID": given})
        assert answer.headers["x-request-id"] == given
        assert answer.json()["headers"]["x-request-id"] == given
        assert answer.json()["state"]["request_id"] == given

    drive(test)


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\tb", "é", '"', "a/../b", "a%0ab"])
def test_another_request_id_is_replaced(given: str | None) -> None:
    """What is missing, too long or unfit for a log never reaches vLLM."""

    async def test() -> None:
        headers = {} if given is None else {"X-Request-ID": given.encode()}
        async with client(RequestId(Echo())) as http:
            answer = await http.get("/v1/models", headers=headers)
        new = answer.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", new)
        assert answer.json()["headers"]["x-request-id"] == new

    drive(test)


def test_an_unhandled_error_has_its_request_id_and_nothing_else() -> None:
    """The cause is raised on to the log and not told to the client."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("in /srv/secret.py")

    async def test() -> None:
        async with client(RequestId(broken)) as http:
            answer = await http.get("/", headers={"X-Request-ID": "mine"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == "mine"
        assert answer.json()["error"]["type"] == "InternalServerError"
        assert "secret" not in answer.text
        connection = Connection()
        with pytest.raises(RuntimeError):
            await RequestId(broken)(connection.scope, connection.receive, connection.send)

    drive(test)


class Lines:
    """A logger, and the lines it was given."""

    def __init__(self) -> None:
        self._text = io.StringIO()
        self.logger = logging.Logger("access")
        self.logger.addHandler(logging.StreamHandler(self._text))

    @property
    def text(self) -> str:
        return self._text.getvalue()

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


def test_logs_one_line_a_request_without_secrets() -> None:
    """What was asked for, by whom and what came of it; not the key, not the query, not the probes."""
    lines, keys = Lines(), ApiKeys()
    keys.add(KEY, "alice")

    async def test() -> None:
        application = AccessLog(RequestId(Authentication(Echo(), keys, ["/health"])), lines.logger)
        async with client(application) as http:
            headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
            answer = await http.post("/v1/models?key=hidden", headers=headers, content=b"12345")
            await http.get("/health")
            await http.get("/v1/models", headers={"authorization": "Bearer sk-wrong"})
        done, refused = lines.read()
        assert set(done) == {
            *("time", "method", "path", "status", "duration_ms", "request_id", "client", "key"),
            *("disconnected", "bytes_in", "bytes_out", "kv_cache"),
        }
        assert done["kv_cache"] is None, "nothing was generated"
        assert (done["method"], done["path"], done["status"]) == ("POST", "/v1/models", 200)
        assert (done["key"], done["request_id"], done["client"]) == ("alice", "mine", "127.0.0.1")
        assert (done["bytes_in"], done["bytes_out"]) == (5, len(answer.content))
        assert (refused["status"], refused["key"]) == (401, None)
        assert not {KEY, "hidden", "sk-wrong"} & set(re.split(r"[^\w-]", json.dumps(lines.read())))

    drive(test)


@pytest.mark.parametrize("end", ["left", "failed"])
def test_logs_what_did_not_end_well(end: str) -> None:
    """A client that left is told from one that got its answer, and a failure from both."""
    lines = Lines()

    async def test() -> None:
        gate = Gate(error=RuntimeError() if end == "failed" else None)
        connection = Connection()
        task = connection.start(AccessLog(RequestId(gate), lines.logger))
        await gate.until_entered(1)
        (connection.leave if end == "left" else gate.open).set()
        if end == "failed":
            with pytest.raises(RuntimeError):
                await task
        else:
            await task
        [line] = lines.read()
        assert line["disconnected"] == (end == "left")
        assert line["status"] == (200 if end == "left" else 500)

    drive(test)


def test_a_line_is_one_line_of_bounded_length() -> None:
    """Whatever a client writes into its path, method and address, where a proxy hands that on."""
    lines = Lines()

    async def test() -> None:
        for path in ("/a\nb\u2028\ud800\x1b[31m", "/" + "\n" * 100_000, "/health\n"):
            connection = Connection(path)
            connection.scope |= {"method": "M" * 100_000, "client": ("c" * 100_000, 1)}
            await connection.start(AccessLog(Echo(404), lines.logger))

    drive(test)
    short, long, probe = lines.read()
    assert (short["path"], probe["path"]) == ("/a\nb\u2028\ud800\x1b[31m", "/health\n")
    assert lines.text.isascii() and lines.text.count("\n") == 3
    assert len(json.dumps(long)) < 3000
