"""What the command line accepts, and how it says no: one screen, with the closest key."""

import difflib
import importlib
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.cli.quick import Parsed

DESCRIPTION = "Align a text-to-image diffusion model with human preference: one YAML is one run."
COMMANDS = {
    "fit": "Train a model; with `evaluate: true`, test the final weights afterwards.",
    "validate": "Compute the validation metrics of a model or a checkpoint.",
    "test": "Make images of the base and the tuned model at the same seeds, and score both.",
    "predict": "Write the images of a prompt file.",
    "cache": "Encode all images and prompts once, so that training need not.",
}
# Lines of a jsonargparse message that repeat the whole value, or list what a union could also have been.
NOISE = re.compile(
    r"^\s*(-\s)?(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|"
    r"Not a valid subclass|Expected a path but|Subclass types expect|- a (class path|dict))"
)


class Parser(LightningArgumentParser):
    """A parser whose errors are short and name the place, and the closest accepted key."""

    reading: list[str] = []  # the config files that are being read, for the error message

    def parse_path(self, path: Any, **kwargs: Any) -> Any:
        self.reading.append(str(path))
        refuse_repeated_keys(self, path)
        config = super().parse_path(path, **kwargs)
        self.reading.pop()
        return config

    def parse_args(self, args: Any = None, **kwargs: Any) -> Any:
        if not self.exit_on_error:  # of a nested class: jsonargparse has read `null` and hands it down as "None"
            args = [re.sub(r"^(--[\w.]+)=None$", r"\1=null", word) for word in args]
        return super().parse_args(args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a nested class: the outer one reports
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        where = f"{self.reading[-1]}: " if self.reading else ""
        self.reading.clear()
        prog = parser.prog.replace(" [options]", "")
        message = message.replace('expected "subcommand" to be one of', "expected a command, one of")
        sys.stderr.write(f"error: {where}{readable(message)}\n{suggestion(message, parser)}")
        sys.stderr.write(f"All options: {prog} --help\n")
        raise SystemExit(2)


def refuse_repeated_keys(parser: Parser, path: Any) -> None:
    """YAML keeps the last of two equal keys and says nothing: a whole section would vanish."""
    try:
        nodes = [yaml.compose(Path(path).read_text(), yaml.SafeLoader)]
    except (yaml.YAMLError, OSError):
        return  # reported by the parser itself
    except UnicodeDecodeError:
        parser.error("is no UTF-8 text; expected a YAML, saved as UTF-8 (not as UTF-16, and no packed file).")
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    parser.error(f"the key {key.value!r} is given twice, again in line {key.start_mark.line + 1}.")
                seen.add(key.value)
                nodes.append(value)


def overridden_option(words: list[str]) -> tuple[str, str] | None:
    """The first option, and the `--config` behind it that would take its place without a word: the last one counts."""
    given: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, _, value = word.partition("=")
        if option in ("-c", "--config"):
            config = value or following
            keys = configured_keys(config) if given else []
            lost = next((earlier for earlier in given if sets(keys, earlier)), None)
            if lost is not None:
                return lost, config
        elif option.startswith("--"):
            given.append(option)
    return None


def sets(keys: list[str], option: str) -> bool:
    """Whether a config with these keys sets the same as an option of the command line, a part of it, or the whole."""
    name = option.removeprefix("--").removesuffix("+").replace(".init_args", "") + "."
    return any(f"{key}.".startswith(name) or name.startswith(f"{key}.") for key in keys)


def configured_keys(path: str) -> list[str]:
    """The dotted keys that a config sets, without `init_args`, as the command line names them."""
    try:
        sections = [("", yaml.safe_load(Path(path).read_text()))]
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return []  # reported by the parser itself
    keys = []
    while sections:
        prefix, section = sections.pop()
        if isinstance(section, dict) and section:
            sections += [(prefix if key == "init_args" else f"{prefix}.{key}", section[key]) for key in section]
        else:
            keys.append(prefix[1:].removesuffix(".class_path"))  # another class, and so all of its settings
    return keys


def readable(message: str) -> str:
    """A jsonargparse message as one path and what is wrong there, without the dump of the whole value."""
    if message.startswith("Unexpected config:"):
        return "is empty or no mapping; expected sections such as `model:`, `data:` and `trainer:`."
    message = re.sub(r"Got value: Namespace\(.*", "", message)
    message = re.sub(r"(Type typing\.Callable\S* .*?callable class: )", r"\n", message)
    path, cls, rest, given = [], "", [], ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            path.append(match[1])
            cls, text = "", match[2]
        elif match := re.match(r"Problem with given class_path '([^']+)':", text):
            if rest:
                break  # the other members of the union
            cls = match[1]
            continue
        if match := re.match(r"Given value: (?!NestedArg|Namespace|\{)(.{1,100})$", text):
            given = match[1]
        elif text and not NOISE.match(line):
            rest.append(text if len(text) < 200 else text[:200] + " ...")
    if len(rest) > 1:  # a number or a class was expected, and the text was taken for a class
        rest = [text for text in rest if not text.startswith("Expected a dot import path string")] or rest
    detail = "\n  ".join(dict.fromkeys(rest))
    detail = re.sub(r"Expected a dot import path string: (.*)", r"no class \1; expected package.module.Class", detail)
    detail = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", detail).replace("typing.Literal[", "one of [")
    detail = re.sub(r"\bExpected an? ", "expected ", detail).replace(". Got value: ", ", got ")
    given = given.rstrip(".")
    if given and given not in detail + cls:
        detail += f"\n  got {given}"
    place = ".init_args.".join(path) + (f" ({cls})" if cls else "")
    return f"{place}: {detail}" if place else detail


def suggestion(message: str, parser: ArgumentParser) -> str:
    """A line with the closest accepted key or class, or nothing."""
    if match := re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", message):
        given = match[1] or match[2]
        known = [action.dest for action in parser._actions if action.dest != "help"]
        if not any(key.split(".")[0] == given.split(".")[0] for key in known):
            given, known = given.split(".")[0], [key for key in known if "." not in key]
        return closest(given, known)
    if match := re.search(r"invalid choice: '([^']+)'", message):
        return closest(match[1], list(COMMANDS))
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        classes = re.findall(r"class_path '([\w.]+)'", message[: match.start()])
        classes = re.findall(r"Got value: Namespace\(class_path='([\w.]+)'", message[match.end() :])[:1] or classes
        return closest(match[1].split(".")[-1], accepted_by(classes[-1])) if classes else ""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return closest(match[2], [name for name in dir(importlib.import_module(match[1])) if name[0] != "_"])
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

    def __init__(self, args: Any = None, stop_after_parsing: bool = False, **kwargs: Any) -> None:
        self.args = args
        self.stop_after_parsing = stop_after_parsing
        super().__init__(
            trainer_class=CachingTrainer,
            parser_class=Parser,
            parser_kwargs={"description": DESCRIPTION},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=args,
            **kwargs,
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
        lightnings = {command: skip | {"weights_only"} for command, skip in LightningCLI.subcommands().items()}
        return lightnings | {"cache": {"model", "datamodule"}}

    def _add_subcommands(self, parser: Parser, **kwargs: Any) -> None:
        given = sys.argv[1:] if self.args is None else self.args
        wanted = {name for name in COMMANDS if name in given} or COMMANDS
        self._subcommand_parsers = {}
        commands = parser.add_subcommands()
        for name, text in COMMANDS.items():
            if name in wanted:
                subparser = self._prepare_subcommand_parser(self.trainer_class, name, description=text)
            else:  # only listed: filling the parsers of four commands takes longer than everything else
                subparser = Parser(description=text)
            self._subcommand_parsers[name] = subparser
            commands.add_subcommand(name, subparser, help=text)

    def parse_arguments(self, parser: Parser, args: Any) -> None:
        if overridden := overridden_option(sys.argv[1:] if args is None else args):
            option, config = overridden
            parser.error(f"{option} stands before {config}, which overrides it; expected after --config {config}.")
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].ckpt_path
        if path not in (None, "last") and "://" not in path and not Path(path).exists():
            self._subcommand_parsers[self.config.subcommand].error(
                f"ckpt_path: {path} does not exist; expected `last` or a file of runs/<name>/version_N/checkpoints."
            )

    def _parse_ckpt_path(self) -> None:
        """Not as LightningCLI: the config of a run is its YAML, never the hyperparameters of a checkpoint."""
        if self.stop_after_parsing:
            raise Parsed
