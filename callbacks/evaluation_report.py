"""What an evaluation found, as a table in the terminal and as a Markdown page."""

from pathlib import Path
from typing import Any

HEADER = ["reward", "base", "tuned", "difference", "win rate"]
NOTHING = "–"  # in the cells of a baseline that there is not


def markdown(text: str) -> str:
    """Text for a cell of a Markdown table: one line, nothing in it taken for markup."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`|*_[]<>#~$!&" else letter for letter in line)


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the headings and the first column, which hold users' words, are escaped."""
    lines = [[markdown(cell) for cell in header], ["---"] * len(header)]
    lines += [[markdown(row[0]), *row[1:]] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def statistics_cells(statistics: dict[str, Any]) -> list[str]:
    """The cells of one reward under `HEADER`, without its name."""
    tuned = f"{statistics['tuned']:.4f}"
    if "base" not in statistics:
        if statistics["tuned_interval"] is not None:
            tuned += " [{:.4f}, {:.4f}]".format(*statistics["tuned_interval"])
        return [NOTHING, tuned, NOTHING, NOTHING]
    difference, win = f"{statistics['difference']:+.4f}", f"{100 * statistics['win_rate']:.1f} %"
    if statistics["difference_interval"] is not None:
        difference += " [{:+.4f}, {:+.4f}]".format(*statistics["difference_interval"])
        win += " [{:.1f}, {:.1f}]".format(*(100 * end for end in statistics["win_rate_interval"]))
    return [f"{statistics['base']:.4f}", tuned, difference, win]


def table_cells(results: dict[str, Any]) -> list[list[str]]:
    """One row of text per reward, under `HEADER`."""
    return [[name, *statistics_cells(statistics)] for name, statistics in results["rewards"].items()]


def settings_line(results: dict[str, Any]) -> str:
    """What was sampled, in one sentence."""
    seeds = results["seeds"]
    seeds = f"seed {seeds['first']}" if seeds["number"] == 1 else "{number} seeds ({first} to {last})".format(**seeds)
    return (
        f"{results['num_prompts']} prompts, {results['num_images']} images, {seeds}, "
        f"{results['num_inference_steps']} steps of {results['sampler']}, guidance {results['guidance_scale']:g}"
        f"{few_steps(results.get('few_step'))}; "
        f"in brackets the {results['interval']}."
    )


def few_steps(sampler: dict[str, Any] | None) -> str:
    """What is said of a distilled model's own sampler."""
    if sampler is None:
        return ""
    return f" (the tuned model: {sampler['num_steps']} {sampler['mode'].upper()} steps of its own, no guidance)"


def baseline_line(results: dict[str, Any]) -> str:
    """What the model was compared with, in one sentence of Markdown."""
    kind = results["baseline"]["kind"]
    if kind == "base":
        return f"Base model: {markdown(results['pretrained'])}."
    if kind == "none":
        return "There is no baseline."
    name = {"checkpoint": "checkpoint", "lora": "LoRA", "pipeline": "pipeline", "images": "images in"}[kind]
    return f"Baseline (under “base”): the {name} {markdown(results['baseline']['path'])}."


def prompts_line(about: dict[str, Any]) -> str:
    """Which prompts were used, in one sentence of Markdown."""
    name = markdown(about["set"] or about["source"])
    used = (
        f"{about['count']} prompts"
        if about["used"] == about["count"]
        else "the first {used} of {count}".format(**about)
    )
    published = {True: ", as published", False: ", not the published text", None: ""}[about.get("as_published")]
    return f"Prompts: {name}, {used}{published} (SHA-256 {about['sha256'][:16]})."


def ties_line(results: dict[str, Any]) -> str | None:
    """How often the scores were equal, in one sentence of Markdown."""
    ties = {name: found["ties"] for name, found in results["rewards"].items() if found.get("ties")}
    shares = ", ".join(f"{markdown(name)} {100 * share:.1f} %" for name, share in ties.items())
    return f"A tie counts as half a win; ties: {shares}." if ties else None


def results_page(results: dict[str, Any], shown: list[dict[str, Any]]) -> str:
    """The Markdown page: the table of rewards, the grid, the groups, and the scores of the images in the grid."""
    tuned = "the weights in memory" if results["checkpoint"] is None else markdown(str(results["checkpoint"]))
    page = ["# Evaluation", "", f"{baseline_line(results)} Tuned model: {tuned}.", ""]
    if results["prompts"] is not None:
        page += [prompts_line(results["prompts"]), ""]
    page += [settings_line(results), "", *markdown_table(HEADER, table_cells(results)), ""]
    if (ties := ties_line(results)) is not None:
        page += [ties, ""]
    page += ["![Base beside tuned](grid.png)", ""]
    for name, groups in results.get("groups", {}).items():
        for reward in results["rewards"]:
            rows = [
                [group, str(found["num_prompts"]), *statistics_cells(found["rewards"][reward])]
                for group, found in groups.items()
            ]
            page += [f"## {markdown(reward)} by {markdown(name)}", ""]
            page += [*markdown_table([name, "prompts", *HEADER[1:]], rows), ""]
    roles = ["base", "tuned"] if results["baseline"]["kind"] != "none" else ["tuned"]
    header = ["prompt", "seed", *(f"{name}, {' → '.join(roles)}" for name in results["rewards"])]
    rows = [
        [row["prompt"], str(row["seed"])]
        + [" → ".join(f"{row[f'{name}_{role}']:.4f}" for role in roles) for name in results["rewards"]]
        for row in shown
    ]
    return "\n".join([*page, *markdown_table(header, rows), ""])


def print_report(results: dict[str, Any], images: str, grid: Path) -> None:
    """The table, a line about the images, and the path of the grid as the last line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = "Tuned model" if results["baseline"]["kind"] == "none" else "Base against tuned model"
    table = Table(title=title, caption=Text(settings_line(results)), box=box.SIMPLE_HEAD)
    for heading in HEADER:
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for row in table_cells(results):
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    print(images)
    print(grid, flush=True)
