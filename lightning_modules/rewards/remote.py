"""A reward that another process computes, asked over HTTP."""

import base64
import io
import json
import math
import time
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from lightning_modules.rewards.base import Reward

MAX_ANSWER = 2**24  # bytes; scores of a batch are some kilobytes
BUSY = (429, 502, 503, 504)  # what a server answers that may do better in a moment


class RemoteReward(Reward):
    """Asks a server for scores: for models that do not install beside this program, or that many runs share.

    Sends `POST url` with `{"images": [PNG as base64, ...], "prompts": [text, ...]}` and expects
    `{"scores": [number, ...]}`, one per image in their order. Images are rounded to 8 bits.

    Args:
        url: Where the server listens, http or https.
        batch_size: Images in one request.
        timeout: Seconds that one request may take, from the first byte sent to the last received.
        retries: How often a request is repeated that met no server, no answer in time, or one that is busy (429, 502,
            503, 504); never after any other answer.
        pause: Seconds before the first repetition; doubled for every further one.
    """

    def __init__(
        self, url: str, batch_size: int = 16, timeout: float = 60.0, retries: int = 3, pause: float = 1.0
    ) -> None:
        super().__init__()
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteReward: url is {url!r}; expected one that begins with http:// or https://.")
        if batch_size < 1 or timeout <= 0 or retries < 0 or pause < 0:
            raise ValueError(
                f"RemoteReward: batch_size {batch_size}, timeout {timeout}, retries {retries}, pause {pause}; expected "
                "at least one image, some time, and nothing negative."
            )
        self.url = url
        self.batch_size = batch_size
        self.timeout = timeout
        self.retries = retries
        self.pause = pause

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            scores += self.ask(as_png(images[batch]), prompts[batch])
        return torch.tensor(scores, dtype=torch.float32)

    def ask(self, images: list[bytes], prompts: list[str]) -> list[float]:
        """Scores of one request's images.

        Raises:
            ConnectionError: if the server was not reached, did not answer in time, or answered with an error.
            ValueError: if it answered something else than one finite number per image.
        """
        content = {"images": [base64.b64encode(image).decode() for image in images], "prompts": prompts}
        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return read_scores(self.url, self.post(body), len(images))
            except HTTPError as error:
                problem = f"answered {error.code} {error.reason}: {error.read(200).decode(errors='replace')!r}"
                if error.code not in BUSY:
                    raise ConnectionError(f"RemoteReward: {self.url} {problem}.") from error
                cause: Exception = error
            except (OSError, HTTPException) as error:
                problem, cause = f"gave no answer ({type(error).__name__}: {error})", error
        raise ConnectionError(
            f"RemoteReward: {self.url} {problem}, {self.retries + 1} times, {self.timeout:g} seconds allowed each. Is "
            "the server running, and does it take this many images at once (batch_size)?"
        ) from cause

    def post(self, body: bytes) -> bytes:
        """Send one request and read its answer, in `timeout` seconds altogether."""
        deadline = time.monotonic() + self.timeout
        request = Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
        with urlopen(request, timeout=self.timeout) as response:
            answer = bytearray()
            while part := response.read1(2**16):  # a server that drips would keep any single read alive
                answer += part
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer did not end in time")
                if len(answer) > MAX_ANSWER:
                    raise ValueError(
                        f"RemoteReward: {self.url} answered more than {MAX_ANSWER} bytes; expected scores."
                    )
            if response.length:
                raise IncompleteRead(bytes(answer), response.length)
            return bytes(answer)


def as_png(images: Tensor) -> list[bytes]:
    """(B, 3, H, W) in [0, 1] -> B encoded images of 8 bits."""
    from PIL import Image

    arrays = (images.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    encoded = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded


def read_scores(url: str, answer: bytes, number: int) -> list[float]:
    """The scores in an answer.

    Raises:
        ValueError: naming the server and what it said, if that is not one finite number per image.
    """
    shown = answer[:200].decode(errors="replace")
    try:
        content = json.loads(answer)
    except ValueError as error:
        raise ValueError(f"RemoteReward: {url} answered {shown!r}, which is not JSON ({error}).") from error
    scores: Any = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
        raise ValueError(f'RemoteReward: {url} answered {shown!r}; expected {{"scores": [number, ...]}}.')
    if len(scores) != number:
        raise ValueError(f"RemoteReward: {url} answered {len(scores)} scores for {number} images: {shown!r}.")
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"RemoteReward: {url} answered {score} for image {i}; expected a finite number.")
    return scores
