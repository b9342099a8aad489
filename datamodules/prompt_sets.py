"""The prompt sets that papers report on: how many prompts, in which files, and the hash of their text where known."""

import hashlib
from dataclasses import dataclass
from typing import Literal

PromptSetName = Literal["pickapic_validation_unique", "hpdv2", "partiprompts", "drawbench"]


@dataclass(frozen=True)
class PromptSet:
    """A published list of prompts.

    Attributes:
        count: Number of prompts.
        hub: Hub id of a data set that holds it.
        where: Where people find it, for error messages.
        files: Its files in that data set, or in a folder of the user's; none if it is a split of a table.
        split: Name of that split.
        columns: Names of the column of the prompts, beyond the usual ones.
        groups: Columns that sort the prompts.
        group_of_file: What the name of a file sorts the prompts by.
        sha256: `hash_of` the published prompts; None where no copy could be read when this was written.
    """

    count: int
    hub: str
    where: str
    files: tuple[str, ...] = ()
    split: str = "train"
    columns: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    group_of_file: str | None = None
    sha256: str | None = None


SETS: dict[str, PromptSet] = {
    "pickapic_validation_unique": PromptSet(
        count=500,  # the data card's
        hub="yuvalkirstain/pickapic_v1_no_images",
        where="the split validation_unique of Pick-a-Pic v1, as parquet, without images too",
        split="validation_unique",
    ),
    "hpdv2": PromptSet(
        count=3200,  # the data card's: 800 of each style
        hub="zhwang/HPDv2",
        where="the folder benchmark of the hub's zhwang/HPDv2",
        files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        group_of_file="style",
    ),
    "partiprompts": PromptSet(
        count=1632,
        hub="nateraw/parti-prompts",
        where="https://github.com/google-research/parti",
        files=("PartiPrompts.tsv",),
        groups=("Category", "Challenge"),
        sha256="f6f70c68ccd707403dbcdb3981bf0aa628a05665610075ef75c0b279b91dcebe",  # Google's own file
    ),
    "drawbench": PromptSet(
        count=200,
        hub="zhwang/HPDv2",
        where="https://imagen.research.google, as a table, or benchmark/drawbench.json of the hub's zhwang/HPDv2",
        files=("benchmark/drawbench.json",),
        columns=("Prompts", "prompts"),
        groups=("Category", "category"),
        # A copy of the authors' table whose text is as long, to the byte, as that of two copies on the hub.
        sha256="4056f6f1125417b3964a1623200158d7de26ee5869d2be8661737297ddca0dd1",
    ),
}


def hash_of(prompts: list[str]) -> str:
    """SHA-256 of the prompts in their order, one per line, without the blanks around them."""
    return hashlib.sha256("\n".join(prompt.strip() for prompt in prompts).encode()).hexdigest()
