from __future__ import annotations

import email.utils
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neurons.doctor import Verdict, as_json, check_clock, check_disk, check_port, check_tokens, examine


def test_tokens_are_reported_as_set_and_never_shown(tmp_path: Path) -> None:
    environ = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "wb_secret"}
    checks = examine(tmp_path, environ=environ)
    assert "secret" not in json.dumps(as_json(checks))
    by_name = {check.name: check for check in checks}
    assert by_name["hub token"].detail == "set in HF_TOKEN"
    assert [check.verdict for check in check_tokens({})] == [Verdict.WARN, Verdict.WARN]


def test_a_port_in_use_fails_with_its_fix() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        check = check_port(port)
    assert check.verdict is Verdict.FAIL
    assert "--axon.port" in check.fix
    assert check_port(port).verdict is Verdict.OK
    assert check_port(99999).verdict is Verdict.FAIL


def test_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    assert str(tmp_path) in check_disk(tmp_path / "not" / "yet").detail


@contextmanager
def hub_whose_clock_is_off_by(seconds: float) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", email.utils.formatdate(time.time() + seconds, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_clock_far_from_the_hubs_fails() -> None:
    with hub_whose_clock_is_off_by(0) as url:
        assert check_clock(url).verdict is Verdict.OK
    with hub_whose_clock_is_off_by(120) as url:
        check = check_clock(url)
    assert check.verdict is Verdict.FAIL
    assert "NTP" in check.fix


def test_a_hub_that_does_not_answer_is_a_warning() -> None:
    assert check_clock("http://127.0.0.1:1").verdict is Verdict.WARN
    assert check_clock("nonsense").verdict is Verdict.WARN
