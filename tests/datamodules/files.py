"""Small data sets on disk, in the layouts that users have."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 56) -> Image.Image:
    """Smooth enough that JPEG and resizing keep most of it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(seed: int, format: str = "JPEG", width: int = 40, height: int = 56) -> bytes:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, format)
    return buffer.getvalue()


def pair_columns(num_rows: int, **columns: Any) -> dict[str, Any]:
    """Columns as in Pick-a-Pic: every third pair is a tie, the others prefer the second or the first image."""
    return {
        "caption": [f"caption {i}" for i in range(num_rows)],
        "jpg_0": [encoded(2 * i) for i in range(num_rows)],
        "jpg_1": [encoded(2 * i + 1) for i in range(num_rows)],
        "label_0": [(0.0, 0.5, 1.0)[i % 3] for i in range(num_rows)],
        "unused": list(range(num_rows)),
        **columns,
    }


def write_parquet(path: Path, num_rows: int = 6, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(pair_columns(num_rows, **columns)), path)
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_jsonl_pairs(folder: Path, num_rows: int = 4, **changes: Any) -> Path:
    """pairs.jsonl, and the images in a folder beside it; `changes` go into row 1."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(num_rows):
        for which in (0, 1):
            picture(2 * i + which).save(folder / f"images/{i}_{which}.png")
        records.append(
            {"caption": f"caption {i}", "jpg_0": f"images/{i}_0.png", "jpg_1": f"images/{i}_1.png", "label_0": i % 2}
        )
    records[1].update(changes)
    return write_jsonl(folder / "pairs.jsonl", records)


def write_pair_folder(folder: Path, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        picture(2 * i).save(folder / f"{name}_w.png")
        picture(2 * i + 1).save(folder / f"{name}_l.png")
        (folder / f"{name}.txt").write_text(f"a {name}\n")
    return folder
