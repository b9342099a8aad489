"""Noising algebra: published numbers, round trips, and the precision that half types would lose."""

import pytest
import torch

from lightning_modules.functional.latents import sample_posterior
from lightning_modules.functional.noise import (
    add_noise,
    draw_noise,
    per_sample_mse,
    regression_target,
    repeat_pair,
    to_epsilon,
    to_x0,
)
from lightning_modules.functional.prompts import drop_prompts
from tests.golden_cases import assert_golden, load_case


def coefficients(prediction_type: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return (1 - t, t) if prediction_type == "flow" else ((1 - t**2).sqrt(), t)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_gives_back_sample_and_noise(prediction_type):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = coefficients(prediction_type, 5)
    x_t = add_noise(x0, noise, alpha, sigma)
    target = regression_target(prediction_type, x0, noise, alpha, sigma)
    torch.testing.assert_close(to_x0(prediction_type, target, x_t, alpha, sigma), x0)
    torch.testing.assert_close(to_epsilon(prediction_type, target, x_t, alpha, sigma), noise)


@pytest.mark.parametrize("function", [regression_target, to_x0, to_epsilon])
def test_unknown_prediction_type_is_refused(function):
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="known are epsilon, v_prediction and flow"):
        function("sample", x, x, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_noised_in_float32(dtype):
    # In bfloat16 sigma of timestep 0, sqrt(1 - 0.99915), would round away; see the spec's trap 2.
    x0, noise = torch.ones(1, 1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    x_t = add_noise(x0, noise, torch.tensor([0.9995749]), torch.tensor([0.0291547]))
    assert x_t.dtype == torch.float32
    assert x_t.item() == pytest.approx(1.0287296)


def test_error_is_the_mean_over_elements_of_each_sample():
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]])
    assert per_sample_mse(prediction, torch.zeros(2, 1, 1, 2)).tolist() == [2.5, 0.0]


def test_noise_offset_shifts_whole_channels():
    like = torch.zeros(2, 3, 64, 64)
    torch.manual_seed(0)
    means = draw_noise(like, offset=10.0).mean((2, 3))
    torch.manual_seed(0)
    plain = draw_noise(like).mean((2, 3))
    assert means.abs().mean() > 3 > 0.1 > plain.abs().mean()


@pytest.mark.parametrize("case", ["pair_noising_base", "pair_noising_turbo", "pair_noising_refiner"])
def test_golden_noising(case):
    tensors, _ = load_case("diffusion_dpo", case)
    pairs = len(tensors["latents"]) // 2
    noise = repeat_pair(tensors["raw_noise"][:pairs])
    # How timesteps are drawn is the backbone's (SDXL-Turbo: tests/backbones/test_sdxl.py); the refiner has none here.
    t = repeat_pair(tensors["raw_timesteps" if case == "pair_noising_base" else "timesteps"][:pairs])
    abar = tensors["alphas_cumprod"][t].double()
    noisy = add_noise(tensors["latents"], noise, abar.sqrt().float(), (1 - abar).sqrt().float())
    assert_golden("diffusion_dpo", case, noise=noise, timesteps=t, noisy_latents=noisy)


@pytest.mark.parametrize("case", ["dpo_loss_v_beta2000", "dpo_loss_v_beta5000"])
def test_golden_velocity_target(case):
    tensors, _ = load_case("diffusion_dpo", case)
    abar = tensors["alphas_cumprod"][tensors["timesteps"]]
    target = regression_target("v_prediction", tensors["latents"], tensors["noise"], abar.sqrt(), (1 - abar).sqrt())
    torch.testing.assert_close(target, tensors["target"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["trace_sd15", "trace_sdxl", "trace_sdxl_turbo"])
def test_golden_trace_of_noising(case):
    tensors, _ = load_case("diffusion_dpo", case)
    abar = tensors["alphas_cumprod"][tensors["timesteps"].long()]
    noisy = add_noise(tensors["latents"], tensors["noise"], abar.sqrt(), (1 - abar).sqrt())
    target = regression_target("epsilon", tensors["latents"], tensors["noise"], abar.sqrt(), (1 - abar).sqrt())
    assert_golden("diffusion_dpo", case, noisy_latents=noisy, target=target)


def test_golden_posterior_sample():
    tensors, _ = load_case("diffusion_dpo", "vae_posterior_sample")
    mean, logvar = tensors["moments"].chunk(2, dim=1)
    assert_golden(
        "diffusion_dpo",
        "vae_posterior_sample",
        latents_sd15=sample_posterior(mean, logvar, tensors["eps"], 0.18215),
        latents_sdxl=sample_posterior(mean, logvar, tensors["eps"], 0.13025),
    )


def test_shift_is_taken_off_before_scaling():
    one = torch.ones(1, 1, 1, 1)
    assert sample_posterior(3 * one, -100 * one, one, 2.0, shift_factor=1.0).item() == pytest.approx(4.0, abs=1e-5)


def test_golden_prompt_dropout():
    tensors, params = load_case("diffusion_dpo", "prompt_dropout")
    prompts = drop_prompts(["a"] * len(tensors["draws"]), tensors["draws"], params["proportion_empty_prompts"])
    assert_golden("diffusion_dpo", "prompt_dropout", dropped=torch.tensor([not prompt for prompt in prompts]))


def test_prompt_dropout_bounds():
    draws = torch.tensor([0.0, 0.5, 0.999])
    assert drop_prompts(["a", "b", "c"], draws, 0.0) == ["a", "b", "c"]
    assert drop_prompts(["a", "b", "c"], draws, 1.0) == ["", "", ""]
