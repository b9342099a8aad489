"""Put the parts that the three training runs left behind into the repository, in half precision.

python -m datamodules.toy_world.ship --unet runs/toy-base/version_0/export/unet
"""

import argparse
import shutil
from pathlib import Path

from datamodules.toy_world.networks import save_half

HERE = Path(__file__).parent


def ship(parts: Path, unet: Path, target: Path) -> None:
    """Replace the shipped pipeline and tiny CLIP.

    Args:
        parts: Folder with the `pipeline` and `clip` of the first two runs.
        unet: Folder of the UNet that the third run exported.
        target: Folder that holds the shipped `pipeline` and `clip`.
    """
    from diffusers import UNet2DConditionModel

    for name in ("pipeline", "clip"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(parts / name, target / name)
    save_half(UNet2DConditionModel.from_pretrained(unet), target / "pipeline" / "unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", type=Path, required=True, help="folder of the UNet exported by toy/base.yaml")
    parser.add_argument("--parts", type=Path, default="runs/toy_world", help="output of toy/vae.yaml and toy/clip.yaml")
    parser.add_argument("--target", type=Path, default=HERE, help="where the shipped pipeline and CLIP lie")
    arguments = parser.parse_args()
    ship(arguments.parts, arguments.unet, arguments.target)


if __name__ == "__main__":
    main()
