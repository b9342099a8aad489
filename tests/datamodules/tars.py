"""Small tars of pairs, whole and damaged."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.datamodules.files import encoded

END_MARK = 1024  # zeros behind the last member, before padding


def sample(key: str, number: int = 0, **changes: bytes | None) -> dict[str, bytes]:
    """Members of one sample as in the published shards; of `changes`, "__" in a name is a dot, null takes away."""
    members = {
        "jpg_0.jpg": encoded(2 * number),
        "jpg_1.jpg": encoded(2 * number + 1),
        "label_0.txt": (b"0.0", b"0.5", b"1.0")[number % 3],
        "label_1.txt": (b"1.0", b"0.5", b"0.0")[number % 3],
        "original_prompt.txt": f"caption {number}".encode(),
    }
    members |= {name.replace("__", "."): content for name, content in changes.items()}
    return {f"{key}.{suffix}": content for suffix, content in members.items() if content is not None}


def samples(number: int, start: int = 0) -> dict[str, bytes]:
    return {name: content for i in range(start, start + number) for name, content in sample(str(i), i).items()}


def write_tar(
    path: Path, members: dict[str, bytes], edit: Callable[[tarfile.TarInfo], Any] = lambda header: None
) -> Path:
    """A tar with these members; `edit` may change a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            edit(header)
            file.addfile(header, io.BytesIO(content))
    return path
