"""The hub is asked once; without it, what is cached is used, and what isn't is one message."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from sftcore import hub
from sftcore.errors import MissingEnvironmentError
from sftcore.hub import require_models, why_unreachable


@pytest.fixture
def answers(monkeypatch):
    """A hub that answers with a status; yields what sets it, and the requests that came."""
    came: list[str] = []
    status = [200]

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            came.append(self.path)
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield status, came
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "is_there"), [(200, True), (404, True), (401, True), (502, False)])
def test_any_answer_but_a_server_error_is_a_hub(answers, status, is_there):
    answers[0][0] = status
    assert (why_unreachable() == "") is is_there
    assert answers[1] == ["/"] and (is_there or f"answers {status}" in why_unreachable())


def test_folders_need_no_hub(answers, tmp_path):
    require_models([str(tmp_path)])
    assert answers[1] == []
    require_models(["org/model"])
    assert answers[1] == ["/"]


def test_what_is_cached_is_used_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back behind this test
    monkeypatch.setattr(hub, "sys", type("Sys", (), {"modules": {}}))
    snapshot = tmp_path / "models--org--there" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    Path(snapshot / "config.json").write_text("{}")
    with pytest.raises(
        MissingEnvironmentError, match=r"cached, and the hub \(http://127.0.0.1:9\)"
    ) as caught:
        require_models(["org/there", "org/absent", "org/other"])
    assert [problem.got for problem in caught.value.problems] == ["org/absent", "org/other"]
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    require_models(["org/there"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
