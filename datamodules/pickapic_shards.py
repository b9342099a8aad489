"""Preference pairs from WebDataset tars, and the command line that packs, unpacks and verifies them.

python -m datamodules.pickapic_shards --help
"""

import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.pickapic import PICKAPIC_COLUMNS, PickAPicDataModule
from datamodules.shard_cache import expand_urls, local_path
from datamodules.tar_index import PUBLISHED_MEMBERS, PairMembers
from datamodules.tar_shards import TarCache, TarRows, open_tars

PURPOSE = "Pack preference pairs into WebDataset tars, unpack and verify them, index those of others."
TAR_COLUMNS = replace(PICKAPIC_COLUMNS, image_0="image_0", image_1="image_1")  # of an index


class PickAPicShardsDataModule(PickAPicDataModule):
    """Preference pairs from WebDataset tars: Pick-a-Pic as Diffusion-ORPO reads it, and look-alikes.

    A sample is <key>.original_prompt.txt, <key>.jpg_0.jpg, <key>.jpg_1.jpg, <key>.label_0.txt, <key>.label_1.txt and,
    where there is more to say, <key>.json. The headers of all shards are read once, at the first start (shards that lie
    elsewhere are read whole for it, unless their index lies beside them; see `python -m datamodules.pickapic_shards`).
    From then on every sample is known, so that filters, epochs and resuming are as exact as with other data.

    Args:
        source: Training shards: paths, globs, brace lists such as data/{00000..00644}.tar, URLs (http, s3, gs, hf, ...;
            shards are copied to cache_dir as they are needed), `pipe:` and a shell command that writes one shard to its
            output; several in a list, or with `::` between them.
        validation_source: Other shards, to validate on. Null validates on nothing.
        members: What the members of a sample are called.
        shuffle_shards: Shards that are read, and whose samples are mixed, at a time. More is more random; of remote
            shards, cache_gb must hold twice as many.
        cache_dir: Keeps indices and copies of remote shards.
        cache_gb: Gigabytes of copies to keep; those used longest ago make room.
        allow_shell_pipes: Run the commands of `pipe:` sources. They go to bash as the config has them, and may do on
            this machine whatever you may: read configs of others before you allow it.
    """

    def __init__(
        self,
        source: str | list[str],
        validation_source: str | list[str] | None = None,
        members: PairMembers = PUBLISHED_MEMBERS,
        shuffle_shards: int = 8,
        cache_dir: str = "~/.cache/limelight/shards",
        cache_gb: float = 100.0,
        allow_shell_pipes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            source,
            split="train",
            validation_split=None if validation_source is None else "validation",
            subset=None,
            columns=TAR_COLUMNS if members.label_0 is not None else replace(TAR_COLUMNS, label_0=None),
            streaming=False,
            shuffle_shards=shuffle_shards,
            cache_dir=cache_dir,
            cache_gb=cache_gb,
            **kwargs,
        )
        self.validation_source = validation_source
        self.members = members
        self.allow_shell_pipes = allow_shell_pipes

    def _shards_of(self, split: str) -> str | list[str]:
        return self.source if split == "train" else self.validation_source

    def _source_of(self, split: str) -> str:
        shards = self._shards_of(split)
        return shards if isinstance(shards, str) or len(shards) < 2 else f"{shards[0]} and {len(shards) - 1} further"

    def _load_rows(self, split: str) -> TarRows:
        cache = TarCache(Path(self.cache_dir), self.cache_gb, self.allow_shell_pipes, self.members)
        rows = open_tars(expand_urls(self._shards_of(split)), cache)
        if len(rows) == 0:
            raise ValueError(f"{self._source_of(split)}: there are no samples in these shards.")
        for option, needed in (
            ("require_label", ["has_label"]),
            ("dreamlike_pairs_only", ["model_0", "model_1"]),
        ):
            missing = [name for name in needed if not np.any(rows.column(name).is_valid())]
            if getattr(self, option) and missing:
                raise ValueError(
                    f"{rows.files[0]}: no sample has {' and '.join(map(repr, missing))} in its "
                    f"{self.members.metadata!r} member, which `{option}: true` needs."
                )
        remote = [size for url, size in zip(rows.files, rows.sizes, strict=True) if local_path(url) is None]
        mixed = sum(sorted(remote)[-2 * self.shuffle_shards :])
        if mixed > self.cache_gb * 1e9:
            raise ValueError(
                f"shuffle_shards is {self.shuffle_shards}, for which up to {mixed / 1e9:.3g} GB of shards must be at "
                f"hand (those being read and those to come), but cache_gb is {self.cache_gb:g}. Raise cache_gb, or "
                "lower shuffle_shards."
            )
        return rows


def main() -> None:
    """The command line; what is wrong with data or arguments is told in one line."""
    from jsonargparse import auto_cli

    from datamodules.shard_packing import index, pack, unpack, verify

    commands = {"pack": pack, "unpack": unpack, "verify": verify, "index": index}
    try:
        auto_cli(commands, prog="python -m datamodules.pickapic_shards", description=PURPOSE)
    except (ValueError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
