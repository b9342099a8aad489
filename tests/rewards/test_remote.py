"""The remote reward against a real server on this machine, which also misbehaves in every way that servers do."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.rewards.remote import RemoteReward
from tests.rewards.tiny import random_images

PROMPTS = ["a red circle", "deux anneaux verts é", "a\nblue square", "", "x"]
released = threading.Event()


def score(image: np.ndarray, prompt: str) -> float:
    """Mean redness plus the prompt's length."""
    return float(image[..., 0].mean() / 255 + len(prompt))


class Server(BaseHTTPRequestHandler):
    """The reference server: `{"images": [PNG as base64], "prompts": [...]}` -> `{"scores": [...]}`, in order.

    Other paths than /score misbehave.
    """

    requests: list[tuple[str, int]] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append((self.path, len(asked["images"])))
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in asked["images"]]
        scores = [score(image, prompt) for image, prompt in zip(images, asked["prompts"], strict=True)]
        calls = sum(path == self.path for path, _ in self.requests)
        misbehave = {
            "/error": lambda: self.answer(500, b"CUDA out of memory"),
            "/busy": lambda: self.answer(503, b"loading") if calls < 3 else self.answer(200, as_json(scores)),
            "/always_busy": lambda: self.answer(503, b"loading"),
            "/not_found": lambda: self.answer(404, b"no such page"),
            "/short": lambda: self.answer(200, as_json(scores[:-1])),
            "/nan": lambda: self.answer(200, as_json([float("nan"), *scores[1:]])),
            "/text": lambda: self.answer(200, as_json([str(s) for s in scores])),
            "/booleans": lambda: self.answer(200, as_json([True] * len(scores))),
            "/list": lambda: self.answer(200, json.dumps(scores).encode()),
            "/html": lambda: self.answer(200, b"<html>Welcome</html>"),
            "/hang": lambda: released.wait(30),
            "/drip": self.drip,
            "/cut": lambda: self.answer(200, as_json(scores), length=10_000),
            "/gone": lambda: None,
        }
        misbehave.get(self.path, lambda: self.answer(200, as_json(scores)))()

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            try:
                self.wfile.write(b" ")
            except OSError:
                return
            if released.wait(0.1):
                return

    def log_message(self, *_: object) -> None:
        pass


def as_json(scores: list) -> bytes:
    return json.dumps({"scores": scores}).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        http.daemon_threads = True
        http.block_on_close = False
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        released.set()
        http.shutdown()


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.requests.clear()


def test_scores_come_back_in_order_in_batches(server):
    images = random_images(5, 9, 7)
    scores = RemoteReward(f"{server}/score", batch_size=2)(images, PROMPTS)
    arrays = np.asarray((images * 255).round().byte().permute(0, 2, 3, 1))
    expected = [score(array, prompt) for array, prompt in zip(arrays, PROMPTS, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert [number for _, number in Server.requests] == [2, 2, 1]
    assert scores.dtype == torch.float32
    assert not RemoteReward.differentiable


def test_a_busy_server_is_asked_again(server):
    assert RemoteReward(f"{server}/busy", pause=0.01)(random_images(1), ["a"]).shape == (1,)
    assert len(Server.requests) == 3


@pytest.mark.parametrize(
    ("path", "error", "message", "requests"),
    [
        ("/error", ConnectionError, "answered 500 .*'CUDA out of memory'", 1),
        ("/not_found", ConnectionError, "answered 404 .*'no such page'", 1),
        ("/always_busy", ConnectionError, r"answered 503 .*'loading', 3 times", 3),
        ("/gone", ConnectionError, "gave no answer", 3),
        ("/short", ValueError, "answered 1 scores for 2 images", 1),
        ("/nan", ValueError, "answered nan for image 0; expected a finite number", 1),
        ("/text", ValueError, r'.*expected {"scores": \[number', 1),
        ("/booleans", ValueError, r'.*expected {"scores": \[number', 1),
        ("/list", ValueError, r'.*expected {"scores": \[number', 1),
        ("/html", ValueError, "answered '<html>Welcome</html>', which is not JSON", 1),
    ],
)
def test_wrong_answers_name_the_server_and_what_it_said(server, path, error, message, requests):
    with pytest.raises(error, match=f"RemoteReward: {server}{path} {message}"):
        RemoteReward(f"{server}{path}", retries=2, pause=0.01)(random_images(2), ["a", "b"])
    assert len(Server.requests) == requests


@pytest.mark.parametrize("path", ["/hang", "/drip", "/cut"])
def test_a_server_that_never_ends_is_left(server, path):
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"gave no answer \((TimeoutError|IncompleteRead|URLError).*0.5 seconds allowed"
    ):
        RemoteReward(f"{server}{path}", timeout=0.5, retries=1, pause=0.01)(random_images(1), ["a"])
    assert time.monotonic() - start < 5


def test_no_server_is_named():
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9/ gave no answer \(URLError.*refused.*2 times"):
        RemoteReward("http://127.0.0.1:9/", retries=1, pause=0.01)(random_images(1), ["a"])


@pytest.mark.parametrize("url", ["", "localhost:80", "file:///etc/passwd", "ftp://x"])
def test_only_http_is_asked(url):
    with pytest.raises(ValueError, match="expected one that begins with http"):
        RemoteReward(url)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"timeout": 0}, {"retries": -1}, {"pause": -1}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match="expected at least one image, some time, and nothing negative"):
        RemoteReward("http://x", **options)
