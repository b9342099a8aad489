"""Checkpoints on disk: written whole or not at all, read without running code, refused with one sentence."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

# Files that show that a folder is a model for `pretrained` and not a checkpoint of a run.
MODEL_FILES = ("model_index.json", "config.json", "adapter_config.json", "pytorch_lora_weights.safetensors")
# Files of the checkpoint folders that FSDP2 and DeepSpeed write.
SHARDED_FILES = ("meta.pt", ".metadata", "latest", "checkpoint")


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint gets its name only once it is completely on disk.

    It is written beside its place, synchronised, and renamed, so that a kill or a full disk leaves the earlier
    checkpoint as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # object stores have no rename; fsspec's transactions serve there
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            raise OSError(
                f"could not write the checkpoint {path}: {describe_write_error(error)}. Earlier checkpoints are "
                "untouched: make room and continue with `--ckpt_path last`."
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(Path(path), map_location)


def describe_write_error(error: Exception) -> str:
    causes = [cause for cause in (error, error.__context__) if isinstance(cause, OSError)]
    return causes[0].strerror or str(causes[0]) if causes else str(error).splitlines()[0]


def read_checkpoint(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file; ValueError or FileNotFoundError says what is wrong with it.

    Args:
        path: The file.
        map_location: As in torch.load.
        mmap: Map the tensors instead of reading them: a check that costs nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist. Runs keep theirs in runs/<name>/version_N.")
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about the pickle protocol
            # Files in torch's old format cannot be mapped.
            checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zipfile(path))
    except PermissionError:
        raise ValueError(f"checkpoint {path} may not be read by this user.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        # It names a function or class outside torch's list of harmless ones, or is a bare pickle.
        if "GLOBAL" in str(error) or path.open("rb").read(1) == pickle.PROTO:
            raise ValueError(
                f"checkpoint {path} is refused: it holds more than tensors and plain values, and reading it could run "
                f"code that someone hid in it ({reason(error)}). Checkpoints of this project never need that."
            ) from None
        raise ValueError(
            f"checkpoint {path} is damaged or is no checkpoint ({reason(error)}). If its writing or copying was "
            "interrupted, use an earlier one."
        ) from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"{path} holds no Lightning checkpoint: its `state_dict` is missing. Bare weights belong into "
            "`model.init_args.backbone.init_args.pretrained`, as a diffusers folder."
        )
    return checkpoint


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (wanted or lines or [type(error).__name__])[0][:160]


def check_checkpoint(path: Path) -> None:
    """Raise if `--ckpt_path` cannot be a checkpoint, before any model is built."""
    if path.is_dir():
        if any((path / name).exists() for name in MODEL_FILES):
            raise ValueError(
                f"--ckpt_path {path} is a model folder, not a checkpoint of a run. To start from it, set "
                "`model.init_args.backbone.init_args.pretrained`; to resume, give a .ckpt file."
            )
        if not any((path / name).exists() for name in SHARDED_FILES):
            raise ValueError(f"--ckpt_path {path} is a folder. Give the .ckpt file in it (runs/<name>/version_N/...).")
        return
    if path.suffix == ".safetensors":
        raise ValueError(
            f"--ckpt_path {path} holds weights only. To start from them, set "
            "`model.init_args.backbone.init_args.pretrained` to their diffusers folder."
        )
    read_checkpoint(path, mmap=True)
