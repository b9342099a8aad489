"""Align a text-to-image diffusion model with human preference.

python main.py fit --config cli_configs/toy/dpo.yaml
python main.py --help
"""

import os
import sys

from lightning_modules.cli import quick


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: As on the command line, without the program's name. None takes them from there.
    """
    if args is None:
        status = quick.answer()
        if status is not None:
            sys.exit(status)
    # OpenMP threads that spin at barriers slow small networks down eightfold on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lightning_modules.cli.app import run  # imports torch: seconds that help and errors need not wait for

    run(args)


if __name__ == "__main__":
    main()
