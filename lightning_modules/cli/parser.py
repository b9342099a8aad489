"""What the command line accepts, and how it says no: one screen, with the closest key."""

import difflib
import importlib
import inspect
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

COMMANDS = {
    "fit": "Train a model; with `evaluate: true`, test the final weights afterwards.",
    "validate": "Compute the validation metrics of a model or a checkpoint.",
    "test": "Make images of the base and the tuned model at the same seeds, and score both.",
    "predict": "Write the images of a prompt file.",
}
# Lines of a jsonargparse message that repeat the whole value or list what a union also could have been.
NOISE = re.compile(
    r"^\s*(-\s)?(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Not a valid subclass|Subclass types expect|- a (class path|dict))"
)


class Parser(LightningArgumentParser):
    """A parser whose errors are short and name the closest accepted key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        lines = shortened(message)
        hint = suggestion(message, parser)
        prog = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"error: {lines}\n{hint}tip: all options are listed by `{prog} --help`\n")
        raise SystemExit(2)


def shortened(message: str) -> str:
    """The lines of a jsonargparse message that say where and what, without those that repeat the whole value."""
    lines = [line for line in message.splitlines() if line.strip()]
    if re.search(r"Problem with given class_path|does not correspond to a subclass|Expected a .*Got value", message):
        lines = [line for line in lines if not NOISE.match(line)]
    text = "\n".join(line if len(line) <= 240 else line[:240] + " ..." for line in lines[:25])
    text = re.sub(r"\. Got value: Namespace\(.*", "", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r'Parser key "([^"]+)":', r"in \1:", text)
    return re.sub(r"Problem with given class_path '([^']+)':", r"\1:", text)


def suggestion(message: str, parser: ArgumentParser) -> str:
    """A line with the closest accepted key or class, or nothing."""
    if match := re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", message):
        given = match[1] or match[2]
        known = [action.dest for action in parser._actions]
        if not any(key.startswith(given.split(".")[0] + ".") or key == given.split(".")[0] for key in known):
            given, known = given.split(".")[0], [key for key in known if "." not in key]
        return closest(given, known)
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        classes = re.findall(r"class_path=?\s?'([\w.]+)'", message[: match.start()] or message)
        classes = re.findall(r"Got value: Namespace\(class_path='([\w.]+)'", message[match.end() :]) or classes
        return closest(match[1].split(".")[-1], accepted_by(classes[-1])) if classes else ""
    if match := re.search(r"class_path '([\w.]+)\.(\w+)':\s+module '[\w.]+' has no attribute", message):
        module = importlib.import_module(match[1])
        return closest(match[2], [name for name, value in vars(module).items() if inspect.isclass(value)])
    return ""


def closest(given: str, known: list[str]) -> str:
    found = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    if found:
        return f"Did you mean {found[0]!r}?\n"
    return f"Accepted are: {', '.join(sorted(known))}.\n" if len(known) <= 30 else ""


def accepted_by(class_path: str) -> list[str]:
    """Names of the init_args of a class."""
    module, name = class_path.rsplit(".", 1)
    return ArgumentParser().add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)


class LimelightParser(LightningCLI):
    """The arguments of every command: LightningCLI's in subclass mode, and ours."""

    def __init__(self, args: Any = None) -> None:
        super().__init__(
            parser_class=Parser,
            parser_kwargs={"description": __doc__},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: Parser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run's folder is runs/<name>/version_N. Null: folder and name of the first config, as toy-dpo.",
        )
        parser.add_argument(
            "--evaluate", type=bool, default=False, help="After fit, test the final weights with the same data module."
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Checkpoints are always read with weights_only=True, so that reading one cannot run code."""
        return {command: skip | {"weights_only"} for command, skip in LightningCLI.subcommands().items()}

    def _add_subcommands(self, parser: Parser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        commands = parser.add_subcommands()
        for name, text in COMMANDS.items():
            self._subcommand_parsers[name] = self._prepare_subcommand_parser(self.trainer_class, name, description=text)
            commands.add_subcommand(name, self._subcommand_parsers[name], help=text)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the config of a run is its YAML, never a checkpoint's hyperparameters."""
