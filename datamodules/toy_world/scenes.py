"""Scenes of the toy world and the captions that describe them, with the split into training and held-out captions."""

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

COLORS = ("red", "yellow", "green", "cyan", "blue", "pink")  # hues at 0, 60, 120, 180, 240 and 300 degrees
SHAPES = ("circle", "square", "triangle", "cross", "ring")
# Free relations ("to the left of") ask a text encoder for word order, which one of this size does not learn.
LAYOUTS = ("in a row", "in a column")

NUM_HELDOUT_PICTURES = 100  # 200 captions: every picture of two items has two captions, one per order of naming

_ITEM = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ITEM}(?: and {_ITEM} ({'|'.join(LAYOUTS)}))?")


class Item(NamedTuple):
    """One coloured shape."""

    color: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What a caption says: one item, or two items of different colours and how they lie."""

    items: tuple[Item, ...]
    layout: str | None = None

    @property
    def caption(self) -> str:
        names = [f"a {item.color} {item.shape}" for item in self.items]
        return names[0] if len(names) == 1 else f"{names[0]} and {names[1]} {self.layout}"

    @property
    def picture(self) -> tuple[frozenset[Item], str | None]:
        """The same for both orders of naming the items: such captions describe the same pictures."""
        return frozenset(self.items), self.layout


def parse(caption: str) -> Scene:
    """Read a caption back into its scene."""
    found = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if found is None or found[1] == found[3]:
        raise ValueError(
            f"toy world: cannot read the caption {caption!r}. Expected one item, as in 'a red circle', or two items of "
            f"different colours, as in 'a red circle and a blue square in a row'. Colours: {', '.join(COLORS)}; "
            f"shapes: {', '.join(SHAPES)}; layouts: {', '.join(LAYOUTS)}."
        )
    if found[3] is None:
        return Scene((Item(found[1], found[2]),))
    return Scene((Item(found[1], found[2]), Item(found[3], found[4])), found[5])


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the world: 30 with one item, 1500 with two."""
    items = [Item(color, shape) for color in COLORS for shape in SHAPES]
    pairs = [(a, b) for a in items for b in items if a.color != b.color]
    return (
        *(Scene((item,)) for item in items),
        *(Scene(pair, layout) for pair, layout in itertools.product(pairs, LAYOUTS)),
    )


@cache
def heldout_scenes() -> tuple[Scene, ...]:
    """The 200 two-item scenes whose captions nothing is ever trained on, in a fixed shuffled order."""
    # Both namings of a picture are held out together: the other order would give the picture away.
    first_namings = [s for s in all_scenes() if len(s.items) == 2 and s.items[0] < s.items[1]]
    chosen = {s.picture for s in random.Random(0).sample(first_namings, NUM_HELDOUT_PICTURES)}
    scenes = [s for s in all_scenes() if s.picture in chosen]
    random.Random(1).shuffle(scenes)
    return tuple(scenes)


@cache
def train_scenes() -> tuple[Scene, ...]:
    """Every scene that is not held out."""
    heldout = set(heldout_scenes())
    return tuple(s for s in all_scenes() if s not in heldout)


def draw_scenes(count: int, rng: random.Random, single_share: float = 0.15) -> list[Scene]:
    """Draw training scenes.

    Args:
        count: Number of scenes.
        rng: Source of the draw.
        single_share: Probability that a scene has one item; drawn evenly, it would be 2 %.
    """
    single = [s for s in train_scenes() if len(s.items) == 1]
    double = [s for s in train_scenes() if len(s.items) == 2]
    return [rng.choice(single if rng.random() < single_share else double) for _ in range(count)]


def change_one_thing(scene: Scene, rng: random.Random) -> Scene:
    """A training scene that differs from `scene` in one colour, one shape, the layout, or who has which colour."""
    while True:
        items, layout = list(scene.items), scene.layout
        which = rng.randrange(len(items))
        kind = rng.choice(("color", "shape", "layout", "binding") if layout else ("color", "shape"))
        if kind == "color":
            items[which] = items[which]._replace(color=rng.choice(COLORS))
        elif kind == "shape":
            items[which] = items[which]._replace(shape=rng.choice(SHAPES))
        elif kind == "layout":
            layout = LAYOUTS[1 - LAYOUTS.index(layout)]
        else:
            items = [Item(items[0].color, items[1].shape), Item(items[1].color, items[0].shape)]
        changed = Scene(tuple(items), layout)
        if changed.picture != scene.picture and changed in _train_set():
            return changed


@cache
def _train_set() -> frozenset[Scene]:
    return frozenset(train_scenes())
