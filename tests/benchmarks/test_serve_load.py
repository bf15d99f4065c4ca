"""The load of benchmarks/serve_load.py against a server whose delays are known."""

import importlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
FIRST, EACH = 0.2, 0.05


class Server(ThreadingHTTPServer):
    running = started = 0
    lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does: the first token after FIRST seconds, the others EACH behind it."""

    server: Server

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        preempted = f'vllm:num_preemptions_total{{engine="0"}} {2 * self.server.started}.0\n'
        running = f'vllm:num_requests_running{{engine="0"}} {self.server.running}.0\n'
        self.wfile.write((f"# HELP vllm:num_preemptions_total x\n{preempted}{running}").encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.running += 1
            self.server.started += 1
        self.send_response(200)
        self.end_headers()
        for i in range(5):
            time.sleep(EACH if i else FIRST)
            self.wfile.write(b'data: {"choices": [{"text": "x"}], "usage": null}\n\n')
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n')
        with self.server.lock:
            self.server.running -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("serve_load")


@pytest.fixture
def address():
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_what_is_measured(script, address):
    found = script.load(address, requests=8, rate=40.0, prompt=3, new_tokens=5)
    assert found["errors"] == []
    assert found["new_tokens"] == 8 * 5
    assert found["preemptions"] == 2 * 8
    assert 2 <= found["in_flight"] <= 8
    assert FIRST <= found["first_token"]["p50"] <= found["first_token"]["p99"] < FIRST + 1
    assert 0.9 * EACH <= found["per_token"]["p50"] < EACH + 0.2
    assert found["tokens_per_second"] == pytest.approx(40 / found["seconds"])
    # open loop: they do not wait for each other, or it would take eight times as long
    assert found["seconds"] < 8 * (FIRST + 4 * EACH) / 2


def test_errors_are_counted(script, address, monkeypatch):
    def broken(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'data: {"error": "no such token"}\n\n')

    monkeypatch.setattr(Handler, "do_POST", broken)
    found = script.load(address, requests=3, rate=100.0, prompt=3, new_tokens=5)
    assert (found["errors"], found["new_tokens"]) == (["no such token"] * 3, 0)


def test_quantiles_by_hand(script):
    assert script.quantiles([float(i) for i in range(101)]) == {"p50": 50.0, "p99": 99.0}
    assert script.quantiles([2.0]) == {"p50": 2.0, "p99": 2.0}


def test_memory_of_a_group(script):
    code = "import time; kept = bytearray(b'x') * 50_000_000; print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert 50_000_000 < script.group_bytes(child.pid) < 100_000_000
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_a_server_that_does_not_start_is_said(script):
    with pytest.raises(SystemExit, match="exit code"), script.served("/bin/false", "folder", 1, 1, False):
        pass
