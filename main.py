"""Align a text-to-image diffusion model with human preference.

python main.py fit --config cli_configs/toy/dpo.yaml
python main.py --help
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: As on the command line, without the program's name. None takes them from there.
    """
    from lightning_modules.cli.app import run

    run(args)


if __name__ == "__main__":
    main()
