"""The learning panel's picture: small charts side by side, bars by timestep and lines over steps, drawn with Pillow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 380, 280  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 62, 50  # around its plot
SCALE = 2  # drawn larger and shrunk, which smooths the lines
TITLE_SIZE, TEXT_SIZE = 15, 12
INK, GREY, PALE, BAND = "#222222", "#707070", "#e2e2e2", "#f1efe6"
COLORS = ("#2a6fb0", "#d1603d", "#4b9a5f", "#8a6bb1")


@dataclass
class Chart:
    """One chart.

    Attributes:
        title: What is shown.
        note: How to read it, in one line.
        x: Names of the categories, or the steps of a line.
        series: Name -> one value for each x; NaN leaves a gap.
        kind: "bars", or "lines" over numeric x.
        across: What x is.
        unit: Written behind the numbers of the y axis.
        level: Height of a dashed line, for comparison.
        band: Lowest and highest value of a shaded range.
        limits: Smallest and largest value that the y axis shows at least.
    """

    title: str
    note: str
    x: list
    series: dict[str, list[float]]
    kind: str = "bars"
    across: str = "timestep"
    unit: str = ""
    level: float | None = None
    band: tuple[float, float] | None = None
    limits: tuple[float, float] = field(default=(math.inf, -math.inf))


def draw_panel(
    names: list[str], metrics: dict[str, Tensor], history: dict[str, list[float]], shares: Tensor, number: int
) -> Image.Image:
    """The picture of one validation.

    Args:
        names: Of the K timestep buckets.
        metrics: Name -> (K + 1,) values now, of each bucket and of all together.
        history: "step", and the values of all buckets together, at every validation so far. The model that is its own
            reference, at step 0, is added.
        shares: (K,) share of each bucket in training.
        number: Of the pairs.
    """
    accuracy, chance = 100 * metrics["accuracy"][-1].item(), 100 / math.sqrt(number)  # two standard deviations
    with_reference = "drift" in metrics
    sides = ("preferred", "rejected")

    def now(name: str, factor: float = 1.0) -> list[float]:
        return (factor * metrics[name][:-1]).tolist()

    def so_far(name: str, factor: float = 1.0) -> list[float]:
        return [factor * value for value in history[name]]

    def relative(changes: Tensor, errors: Tensor) -> list[float]:
        return (100 * changes / (errors - changes)).tolist()

    step, of_pairs = f"Step {history['step'][-1]:.0f}", f"{accuracy:.0f} % of {number} held-out pairs"
    if with_reference:
        verdict = "about what guessing gives"
        if abs(accuracy - 50) > chance:
            verdict = "more than guessing gives" if accuracy > 50 else "FEWER than guessing gives"
        heading = [f"{step}: the model now favours the preferred image of {of_pairs}: {verdict}"]
    else:
        heading = [f"{step}: the model denoises the preferred image better in {of_pairs}"]
    heading.append("By timestep: from little noise (left) to almost nothing but noise (right). Always the same noise.")
    if not with_reference:
        heading[1] += " Compare with the first picture: no copy of the starting weights is kept."

    guessing = {"unit": " %", "level": 50.0, "band": (50 - chance, 50 + chance)}
    start = [0.0] if with_reference else []
    steps = {"x": start + history["step"], "kind": "lines", "across": "optimizer step"}
    note = "pairs ranked as labelled; shaded: guessing"
    charts = [
        Chart("Accuracy so far", note, series={"": [50.0] * len(start) + so_far("accuracy", 100)}, **steps, **guessing),
        Chart("Accuracy", note, names, {"": now("accuracy", 100)}, limits=(0, 100), **guessing),
    ]
    if with_reference:
        past = {s: [torch.tensor(history[f"{what}_{s}"]) for what in ("change", "error")] for s in sides}
        here = {s: [metrics[f"{what}_{s}"][:-1] for what in ("change", "error")] for s in sides}
        past, here = {s: start + relative(*past[s]) for s in sides}, {s: relative(*here[s]) for s in sides}
        note, what = "it learns while preferred stays below rejected", "Error against the start"
        charts.append(Chart(f"{what} so far", note, series=past, unit=" %", **steps))
        charts.append(Chart(what, note, names, here, unit=" %"))
    else:
        note = "of the prediction"
        charts.append(Chart("Error so far", note, series={s: so_far(f"error_{s}") for s in sides}, **steps))
        charts.append(Chart("Error", note, names, {s: now(f"error_{s}") for s in sides}))
    if "decision" in metrics:
        note = "what the sigmoid sees: 0 undecided, 3 settled"
        charts.append(Chart("Decision", note, names, {"": now("decision")}))
        note = "settled pairs, which hardly pull any more"
        charts.append(Chart("Saturated", note, names, {"": now("saturated", 100)}, unit=" %", limits=(0, 10)))
    series = {"gradient": now("gradient_share", 100), "timesteps": (100 * shares).tolist()}
    charts.append(Chart("Share of the gradient", "who pulls, beside how often it is trained", names, series, unit=" %"))
    if with_reference:
        note = "mean squared change of the prediction"
        charts.append(Chart("Drift from the start", note, names, {"": now("drift")}))
    return draw_charts(charts, heading, columns=4)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, at most so many and one, that enclose a range: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def draw_charts(charts: list[Chart], heading: list[str], columns: int) -> Image.Image:
    """Draw charts in rows below a heading.

    Args:
        charts: What to draw.
        heading: Lines of text above; the first one is larger.
        columns: Charts in a row.
    """
    top = 14 + 22 * len(heading)
    rows = -(-len(charts) // columns)
    picture = Image.new("RGB", (SCALE * (columns * WIDTH + 10), SCALE * (top + rows * HEIGHT + 6)), "white")
    pen = Pen(ImageDraw.Draw(picture))
    for number, line in enumerate(heading):
        pen.text((14, 10 + 22 * number), line, INK if number == 0 else GREY, TITLE_SIZE + 3 * (number == 0))
    for number, chart in enumerate(charts):
        draw_chart(pen, chart, (number % columns) * WIDTH + 5, top + (number // columns) * HEIGHT)
    return picture.resize((picture.width // SCALE, picture.height // SCALE), Image.Resampling.LANCZOS)


class Pen:
    """Draws in pixels of the finished picture.

    Args:
        draw: Of the enlarged one.
    """

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def text(self, xy: tuple[float, float], text: str, color: str, size: int = TEXT_SIZE, anchor: str = "la") -> None:
        font = ImageFont.load_default(size=SCALE * size)
        self.draw.text((SCALE * xy[0], SCALE * xy[1]), text, fill=color, font=font, anchor=anchor)

    def line(self, points: list[tuple[float, float]], color: str, width: float = 1.0) -> None:
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], color, round(SCALE * width), joint="curve")

    def dashes(self, left: float, right: float, y: float, color: str) -> None:
        for x in range(round(left), round(right), 8):
            self.line([(x, y), (min(x + 5, right), y)], color, 1.5)

    def box(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        self.draw.rectangle((SCALE * left, SCALE * top, SCALE * right, SCALE * bottom), fill=color)

    def dot(self, x: float, y: float, color: str, radius: float = 3.0) -> None:
        self.draw.ellipse([SCALE * (c + s * radius) for s in (-1, 1) for c in (x, y)], fill=color)


def draw_chart(pen: Pen, chart: Chart, left: float, top: float) -> None:
    """Draw one chart with its upper left corner there."""
    pen.text((left + 8, top + 6), chart.title, INK, TITLE_SIZE)
    pen.text((left + 8, top + 26), chart.note, GREY)
    shown = [value for values in chart.series.values() for value in values if math.isfinite(value)]
    shown += [value for value in (chart.level, *(chart.band or ()), *chart.limits) if value and math.isfinite(value)]
    if chart.kind == "bars" or not shown:
        shown.append(0.0)
    marks = ticks(min(shown), max(shown))
    low, high = marks[0], marks[-1]
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + TOP, top + HEIGHT - BOTTOM

    def height(value: float) -> float:
        return y1 - (value - low) / (high - low) * (y1 - y0)

    if chart.band is not None:
        pen.box(x0, height(chart.band[1]), x1, height(chart.band[0]), BAND)
    for mark in marks:
        pen.line([(x0, height(mark)), (x1, height(mark))], GREY if mark == 0 else PALE)
        pen.text((x0 - 6, height(mark)), f"{mark:.4g}{chart.unit}", GREY, anchor="rm")
    if chart.kind == "bars":
        draw_bars(pen, chart, x0, x1, y1, height)
    else:
        draw_lines(pen, chart, x0, x1, y1, height)
    if chart.level is not None:
        pen.dashes(x0, x1, height(chart.level), INK)
    pen.text((x1, y1 + 24), chart.across, GREY, anchor="ra")
    if len(chart.series) > 1:
        x = x0
        for color, name in zip(COLORS, chart.series, strict=False):
            pen.box(x, top + 47, x + 9, top + 56, color)
            pen.text((x + 13, top + 45), name, INK)
            x += 26 + pen.draw.textlength(name, ImageFont.load_default(size=SCALE * TEXT_SIZE)) / SCALE


def draw_bars(pen: Pen, chart: Chart, x0: float, x1: float, bottom: float, height: Callable[[float], float]) -> None:
    """A group of bars for each category."""
    slot = (x1 - x0) / len(chart.x)
    bar = 0.72 * slot / len(chart.series)
    for place, name in enumerate(chart.x):
        start = x0 + slot * place + 0.14 * slot
        pen.text((x0 + slot * (place + 0.5), bottom + 8), str(name), GREY, anchor="ma")
        for number, values in enumerate(chart.series.values()):
            if math.isfinite(values[place]):
                ends = sorted((height(0.0), height(values[place])))
                edge = start + bar * number
                pen.box(edge, ends[0], edge + bar - 1, max(ends[1], ends[0] + 0.5), COLORS[number])


def draw_lines(pen: Pen, chart: Chart, x0: float, x1: float, bottom: float, height: Callable[[float], float]) -> None:
    """A line for each series over the steps, from step 0 on."""
    last = max(chart.x) or 1
    for mark in ticks(0, last, 4):
        if mark <= last:
            pen.text((x0 + (x1 - x0) * mark / last, bottom + 8), f"{mark:.6g}", GREY, anchor="ma")
    for color, values in zip(COLORS, chart.series.values(), strict=False):
        points = [
            (x0 + (x1 - x0) * x / last, height(value))
            for x, value in zip(chart.x, values, strict=True)
            if math.isfinite(value)
        ]
        if len(points) > 1:
            pen.line(points, color, 2.0)
        for point in points:
            pen.dot(*point, color)
