"""`python main.py cache`: Lightning's Trainer runs the encoders once over everything that training would show them."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_modules.base import AlignmentModule, compute_dtype, describe_encoders
from lightning_modules.rewards.base import Reward, score_each

# What a run's config says of the machine; the rest (callbacks, loggers, limits) is about training.
MACHINE = {"accelerator", "devices", "num_nodes", "precision", "plugins", "enable_progress_bar"}


class Encoder(LightningModule):
    """The encoders of a backbone, and no denoiser.

    Args:
        module: The model of the run's config; not loaded yet.
    """

    def __init__(self, module: AlignmentModule) -> None:
        super().__init__()
        self.backbone = module.backbone

    def configure_model(self) -> None:
        backbone = self.backbone
        if backbone.loaded:
            return
        backbone.load(compute_dtype(self.trainer), fingerprint=True)
        # Gigabytes that nobody needs here. What stands in its place knows the device.
        setattr(backbone.pipeline, backbone.denoiser_name, None)
        setattr(backbone, backbone.denoiser_name, nn.Linear(1, 1).requires_grad_(False))

    def describe(self, resolution: int) -> dict[str, Any]:
        """What encodes, and the shapes of what it gives: of `moments` for one image, of each embedding for one prompt.

        Args:
            resolution: Edge of the images.
        """
        with torch.no_grad():
            moments = self.backbone.encode_moments(torch.zeros(1, 3, resolution, resolution, device=self.device))
            embeddings = self.backbone.encode_prompts([""])
        return describe_encoders(self.backbone) | {
            "moments": list(moments.shape[1:]),
            "embeddings": {name: list(tensor.shape[1:]) for name, tensor in embeddings.items()},
        }

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> bool:
        answer: dict[str, Tensor]
        if "prompts" in batch:
            answer = self.backbone.encode_prompts(batch["prompts"])
        else:
            answer = {"moments": self.backbone.encode_moments(batch["images"])}
        self.trainer.datamodule.keep(batch, answer)
        return True


class EncodingBar(TQDMProgressBar):
    """Counts the batches of the first device."""

    predict_description = "Encoding"


class Scorer(LightningModule):
    """Rewards, for prediction.

    Args:
        rewards: Name -> reward.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        super().__init__()
        self.rewards = nn.ModuleDict(rewards)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> bool:
        scores = {name: score_each(self.rewards[name], batch["images"], batch["prompts"]) for name in batch["rewards"]}
        self.trainer.datamodule.keep(batch, scores)
        return True


class CachingTrainer(Trainer):
    """Lightning's Trainer, which can fill a cache as well."""

    def cache(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        folder: str | None = None,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        rows_per_shard: int = 256,
        rewards: dict[str, Reward] | None = None,
        encode: bool = True,
        ckpt_path: str | None = None,
    ) -> None:
        """Encode all images and prompts once, or score all pairs, or both.

        `data.init_args.cache: <folder>` then trains without the encoders, and `data.init_args.labels_from:
        <folder>/scores/<name>` on the preferences of a reward.

        Args:
            model: Has the backbone whose encoders are used.
            datamodule: Knows the rows.
            folder: Where the cache goes; what is there already is kept. Null means `data.init_args.cache`.
            dtype: Type of the stored numbers.
            rows_per_shard: Rows, and prompts, in a file: what an interruption loses at most, on each device.
            rewards: Name -> reward that scores both images of every pair as they are stored, for example
                `--rewards.pickscore PickScore`. The scores go to scores/<name> in the folder.
            encode: Whether to encode. With false only the rewards score, and no model is loaded.
            ckpt_path: Must be null, as in the config.yaml of a run: training does not change the encoders.
        """
        if ckpt_path is not None:
            raise ValueError(
                "ckpt_path: no checkpoint holds encoders, which are the same after training. Leave it out."
            )
        if not isinstance(model, AlignmentModule):
            raise ValueError(f"{type(model).__name__} has no backbone whose encoders could fill a cache.")
        if not hasattr(datamodule, "cache_filling"):
            raise ValueError(
                f"{type(datamodule).__name__} cannot be cached; PickAPicDataModule and those made of it can."
            )
        if not encode and not rewards:
            raise ValueError("There is nothing to do: encode is false, and there are no `--rewards` to score with.")
        scoring = None
        if rewards:
            for reward in rewards.values():
                reward.requires_grad_(False).eval().load()  # a wrong weight file is told of before hours of encoding
            about = {name: reward.describe() for name, reward in rewards.items()}
            scoring = datamodule.score_filling(folder, rows_per_shard, about)
        if encode:
            filling = datamodule.cache_filling(folder, dtype, rows_per_shard)
            self.predict(Encoder(model), datamodule=filling, return_predictions=False)
            rank_zero_info(f"The cache is complete. To train from it: `--data.init_args.cache {filling.folder}`")
        if scoring is not None:
            self.predict(Scorer(rewards), datamodule=scoring, return_predictions=False)
            told = " or ".join(str(path) for path in scoring.folders.values())
            rank_zero_info(f"The scores are complete. To train on them: `--data.init_args.labels_from {told}`")
