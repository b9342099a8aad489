"""Published weight files: found, read without running code from them, and fitted key by key into a network."""

import hashlib
import re
import struct
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
SHOWN = 4  # names in an error message
# What torch.load raises on damaged files; its unpickler follows whatever the bytes say.
DAMAGED = (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)
DAMAGED += (AssertionError, ArithmeticError, struct.error)


def check_source(option: str, source: str, needed: str | tuple[str, ...]) -> None:
    """Stop early when what can only be a local path does not hold a model.

    Args:
        option: Name of the setting, for the message.
        source: Folder or hub id.
        needed: File, or files of which one, must be in the folder.

    Raises:
        FileNotFoundError: naming the option, the path, and what was expected there.
    """
    folder, needed = Path(source), (needed,) if isinstance(needed, str) else needed
    if source and folder.is_dir():
        if any((folder / name).is_file() for name in needed):
            return
        raise FileNotFoundError(
            f"{option}: the folder {source!r} has no {' or '.join(needed)}. It holds: "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[: 2 * SHOWN]) or 'nothing'}."
        )
    # A hub id is "name" or "owner/name"; everything else can only be a path.
    if not is_hub_id(source):
        raise FileNotFoundError(
            f"{option}: there is no folder {source!r} (looked in {Path.cwd()}); expected a folder with "
            f"{' or '.join(needed)}, or a hub id such as openai/clip-vit-large-patch14."
        )


def is_hub_id(source: str) -> bool:
    """Whether a name may be a repository on the hub rather than a path."""
    path_like = source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1 or "\\" in source
    return bool(source) and not path_like and not Path(source).exists() and Path(source).suffix not in WEIGHT_SUFFIXES


def check_file(option: str, path: str) -> None:
    """Stop early when a weight file is not there.

    Raises:
        FileNotFoundError: naming the option and the path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{option}: there is no file {path!r} (looked in {Path.cwd()}); expected the downloaded weights."
        )


def find(option: str, source: str, names: tuple[str, ...]) -> Path:
    """The first of `names` that a folder or a repository on the hub has.

    Raises:
        FileNotFoundError: if it has none of them, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        for name in names:
            if (Path(source) / name).is_file():
                return Path(source) / name
        raise FileNotFoundError(f"{option}: the folder {source!r} has no {' or '.join(names)}.")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    problems = []
    for name in names:
        try:
            return Path(hf_hub_download(source, name))
        except (HfHubHTTPError, OSError, ValueError) as error:  # without a network a later name may still be at hand
            problems.append(error)
    raise FileNotFoundError(
        f"{option}: cannot get {' or '.join(names)} of {source!r} from the hub: "
        f"{first_line(problems[0])}. Without a network, give the folder of a copy."
    ) from problems[0]


def read_weights(option: str, path: Path, below: tuple[str, ...] = ("state_dict",)) -> dict[str, Tensor]:
    """The state dict of a file; pickles are read with `weights_only`, so that none of their code runs.

    A state dict may lie under a key, and all its names may begin with `module.`.

    Args:
        option: Name of the setting, for messages.
        path: The file.
        below: Keys under which a state dict may lie; the first that is there counts.

    Raises:
        ValueError: if the file is damaged, holds code, or something else than named tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *DAMAGED) as error:
        if code := re.search(r"Unsupported global: GLOBAL \S+", str(error)):
            raise ValueError(
                f"{option}: {str(path)!r} holds more than tensors, and is not read, because that could run any code "
                f"({code[0]}). If you trust the file, save its state dict: "
                "torch.save(torch.load(path, weights_only=False).state_dict(), new_path)."
            ) from error
        raise ValueError(
            f"{option}: {str(path)!r} is not a readable weight file ({first_line(error)}); it has "
            f"{path.stat().st_size} bytes. Was the download cut short, or is it a web page instead of the file?"
        ) from error
    if isinstance(weights, dict):
        weights = next((weights[key] for key in below if isinstance(weights.get(key), dict)), weights)
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        names = list(weights)[:SHOWN] if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{option}: {str(path)!r} holds no state dict but {names}; expected tensors by name.")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def first_line(error: BaseException) -> str:
    """What a library says, short, and without the full stop; its type where it says nothing."""
    text = str(error).split("WeightsUnpickler error: ")[-1]  # before it stands advice to run the file's code
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:120].rstrip(".")


def check_sha256(option: str, path: Path, expected: str) -> None:
    """Compare a file with its published hash.

    Raises:
        ValueError: if it is another file, or a damaged one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{option}: {str(path)!r} has the SHA-256 {found}, but the published file of that name has {expected}. "
            "Download it again; another head goes under another name."
        )


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without memory for its weights and without drawing random numbers for them; buffers are real."""
    from accelerate import init_empty_weights

    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return build()


def fit(option: str, path: Path, weights: dict[str, Tensor], network: nn.Module) -> nn.Module:
    """Put weights into a network built by `build_empty`, name by name, as float32.

    `position_ids`, which older libraries saved, are left out where they are 0, 1, 2, ...

    Returns:
        The network, frozen and in evaluation mode.

    Raises:
        ValueError: naming the weights that are missing, not known, or of another shape.
    """
    expected = network.state_dict()
    weights = {name: value for name, value in weights.items() if name in expected or not is_position_ids(name, value)}
    check_shapes(option, path, weights, expected)
    with torch.inference_mode(False):
        network.load_state_dict(weights, assign=True)
        return network.float().requires_grad_(False).eval()


def check_shapes(option: str, path: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare the weights of a file with those of a network, by name and shape.

    Raises:
        ValueError: naming the weights that are missing, not known, or of another shape.
    """
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    other = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or unknown or other:
        problems = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other))
            if names
        ]
        raise ValueError(
            f"{option}: the weights in {str(path)!r} do not fit the network: {'; '.join(problems)}. Expected "
            f"{len(expected)} tensors such as {', '.join(list(expected)[:2])}. Is it the file of another model?"
        )


def is_position_ids(name: str, value: Tensor) -> bool:
    """Whether it is a saved buffer that only counts 0, 1, 2, ..."""
    count = torch.arange(value.numel(), dtype=value.dtype)
    return name.endswith("position_ids") and torch.equal(value.flatten(), count)
