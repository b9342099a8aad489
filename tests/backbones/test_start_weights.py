"""A fully trained student's start from a bare state dict, in the layout in which DMD2 publishes its one-step SDXL."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.backbones.base import SCORE, Backbone
from tests.methods.dmdr_runs import backbone_of, lora
from tests.real_size import save_sdxl_configs


def with_score(sdxl: Path) -> Backbone:
    backbone = backbone_of("sdxl", sdxl, adapters=False)
    backbone.load()
    backbone.add_score(lora(), 2.0)
    return backbone


def other_weights(backbone: Backbone, prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = backbone.denoiser.state_dict().items()
    return {prefix + name: torch.randn(value.shape, generator=generator) for name, value in weights}


@pytest.mark.parametrize("prefix", ["", "module.", "unet.", "feedforward_model.", "module.feedforward_model."])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_the_student_starts_from_the_file_and_the_score_network_stays_the_base(sdxl, tmp_path, prefix, suffix):
    backbone = with_score(sdxl)
    base = {name: value.clone() for name, value in backbone.score_denoiser.state_dict().items()}
    weights = other_weights(backbone, prefix)
    (save_file if suffix == ".safetensors" else torch.save)(weights, tmp_path / f"start{suffix}")
    backbone.load_start_weights(str(tmp_path / f"start{suffix}"))
    for name, value in backbone.denoiser.state_dict().items():
        assert torch.equal(value, weights[prefix + name])
    assert all(torch.equal(value, base[name]) for name, value in backbone.score_denoiser.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.denoiser.parameters())


def test_half_precision_files_become_float32(sdxl, tmp_path):
    backbone = with_score(sdxl)
    weights = {name: value.half() for name, value in other_weights(backbone).items()}
    torch.save(weights, tmp_path / "start.bin")
    backbone.load_start_weights(str(tmp_path / "start.bin"))
    parameter = backbone.denoiser.conv_in.weight
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.detach(), weights["conv_in.weight"].float())


def test_the_teacher_is_the_base(sdxl, tmp_path):
    backbone, base = with_score(sdxl), with_score(sdxl)
    torch.save(other_weights(backbone), tmp_path / "start.bin")
    backbone.load_start_weights(str(tmp_path / "start.bin"))
    x, t = torch.randn(1, *backbone.latent_shape), torch.tensor([399])
    with torch.no_grad(), backbone.role(SCORE, 0.0):
        teacher = backbone.predict(x, t, backbone.encode_prompts(["a ring"]))
        assert torch.equal(teacher, base.predict(x, t, base.encode_prompts(["a ring"])))


def wrong(backbone: Backbone, what: str) -> object:
    weights = other_weights(backbone)
    if what == "missing":
        del weights["mid_block.resnets.0.conv1.weight"]
    elif what == "unknown":
        weights["guidance_model.conv_in.weight"] = torch.zeros(1)
    elif what == "shape":
        weights["conv_in.weight"] = torch.zeros(8, 9, 3, 3)  # an inpainting UNet
    elif what == "lora":
        weights = {f"unet.{name}.lora_A.weight": value for name, value in weights.items()}
    elif what == "prefix":  # of some names only
        weights = {f"module.{n}" if n.startswith("mid") else n: value for n, value in weights.items()}
    elif what == "list":
        weights = [1, 2]
    return weights


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "1 missing .mid_block.resnets.0.conv1.weight"),
        ("unknown", "1 unknown .guidance_model.conv_in.weight"),
        ("shape", "1 of another shape .conv_in.weight .8, 9, 3, 3. instead of .8, 4, 3, 3"),
        ("lora", "missing .*unknown .*lora_A"),
        ("prefix", "missing .mid_block.*unknown .module.mid_block"),
        ("list", "holds no state dict but list"),
    ],
)
def test_other_layouts_are_refused_with_one_error_and_nothing_is_changed(sdxl, tmp_path, what, message):
    backbone = with_score(sdxl)
    before = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    torch.save(wrong(backbone, what), tmp_path / "start.bin")
    with pytest.raises(ValueError, match=f"model.start_weights: .*{message}"):
        backbone.load_start_weights(str(tmp_path / "start.bin"))
    assert all(torch.equal(value, before[name]) for name, value in backbone.denoiser.state_dict().items())


class Opens:
    def __reduce__(self):
        return open, ("/tmp/never", "w")


def test_code_in_a_file_is_not_run(sdxl, tmp_path):
    (tmp_path / "start.bin").write_bytes(pickle.dumps({"conv_in.weight": Opens()}))
    with pytest.raises(ValueError, match="model.start_weights"):
        with_score(sdxl).load_start_weights(str(tmp_path / "start.bin"))
    assert not Path("/tmp/never").exists()


def test_real_size_has_the_published_layout(tmp_path):
    backbone = backbone_of("sdxl", save_sdxl_configs(tmp_path), adapters=False)
    with torch.device("meta"):
        backbone.load(torch.bfloat16, weights=False)
    weights = backbone.denoiser.state_dict()
    assert len(weights) == 1680
    assert sum(value.numel() for value in weights.values()) == 2_567_463_684
    assert Counter(name.split(".")[0] for name in weights) == {
        **{"conv_in": 2, "time_embedding": 4, "add_embedding": 4, "down_blocks": 572, "mid_block": 226},
        **{"up_blocks": 868, "conv_norm_out": 2, "conv_out": 2},
    }
