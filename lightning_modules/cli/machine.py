"""Says before anything is loaded what this machine cannot run, and the way out."""

import importlib.util
import os
from typing import Any

import torch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "NODE_RANK")


def check_machine(trainer: Any) -> None:
    """Check the trainer's settings against the machine.

    Args:
        trainer: The parsed `trainer` section, before anything is instantiated.
    """
    strategy = getattr(trainer.strategy, "class_path", None) or str(trainer.strategy)
    precision = str(trainer.precision)
    if trainer.precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision!r}; expected one of {', '.join(PRECISIONS)}. Trained weights stay "
            "float32; the frozen networks are held in low precision by either mixed setting."
        )
    gpus = torch.cuda.device_count()
    if "deepspeed" in strategy.lower():
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "trainer.strategy asks for DeepSpeed, which is not installed: `uv sync --extra deepspeed` (Linux with "
                "CUDA). Without it, cli_configs/trainer/ddp.yaml or fsdp2.yaml train on several GPUs."
            )
        if not gpus:
            raise ValueError("trainer.strategy asks for DeepSpeed, which needs CUDA GPUs, and this machine has none.")
    if strategy.endswith("ModelParallelStrategy"):
        if not gpus:
            raise ValueError(
                "trainer.strategy asks for FSDP2 (ModelParallelStrategy), which needs CUDA GPUs, and this machine has "
                "none. On the CPU use cli_configs/trainer/cpu_smoke.yaml."
            )
        if precision == "16-mixed":
            raise ValueError("FSDP2 (ModelParallelStrategy) cannot train in 16-mixed; use precision: bf16-mixed.")
    accelerator = str(trainer.accelerator)
    if accelerator in ("gpu", "cuda") and not gpus:
        raise ValueError(
            f"trainer.accelerator is {accelerator!r}, but torch sees no CUDA GPU on this machine (`nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES tell why). To run on the CPU, use cli_configs/trainer/cpu_smoke.yaml."
        )
    if precision == "16-mixed" and (accelerator == "cpu" or not gpus):
        raise ValueError("precision 16-mixed needs a GPU; on the CPU use 32-true or bf16-mixed.")
    if gpus and accelerator in ("gpu", "cuda") and isinstance(trainer.devices, int) and trainer.devices > gpus:
        raise ValueError(
            f"trainer.devices is {trainer.devices}, but this machine has {gpus} GPU(s): set `--trainer.devices {gpus}`."
        )
    if trainer.num_nodes > 1 and not any(name in os.environ for name in LAUNCHERS):
        raise ValueError(
            f"trainer.num_nodes is {trainer.num_nodes}, but this process was started by hand and would wait for the "
            "other nodes for ever. Start every node with torchrun or srun: the commands are in "
            "cli_configs/trainer/2nodes.yaml."
        )


def check_optimizer(model: Any, trainer: Any) -> None:
    """Check that the optimizer of a training run can be built on this machine.

    Args:
        model: The parsed `model` section, before anything is instantiated.
        trainer: The parsed `trainer` section.
    """
    settings = getattr(model, "init_args", None)
    name = getattr(getattr(settings, "optimizer", None), "class_path", "")
    if not name.startswith("bitsandbytes.") and name != "lightning_modules.optimizers.AdamW8bit":
        return
    missing = []
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes, which is not installed (`uv sync --extra bitsandbytes`)")
    if not torch.cuda.device_count() or str(trainer.accelerator) == "cpu":
        missing.append("a CUDA GPU, which this run does not use")
    if missing:
        raise ValueError(
            f"model.optimizer is {name}; it needs {' and '.join(missing)}. Without it, train the same run with "
            "`--model.optimizer torch.optim.AdamW`, which takes 6 bytes more of memory per trained weight."
        )
