"""Schedulers of distilled models: diffusers, by itself, takes the steps that were trained."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import LCMScheduler as LCM

from lightning_modules.backbones.few_step_schedulers import few_step_scheduler, stretched_shift
from lightning_modules.functional.few_step import epsilon_timesteps, few_step_trajectory, flow_times

SDXL = dict(EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config)
FLOW = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 0.5, 12.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_schedulers_of_flows_hold_every_shift_and_number_of_steps(mode, shift, n):
    times = flow_times(n, shift)[:-1]
    scheduler, told = few_step_scheduler((1000 * times).tolist(), mode, "flow", FLOW)
    assert told == {}
    scheduler = type(scheduler).from_config(scheduler.config)  # as a user reads it
    scheduler.set_timesteps(n)
    torch.testing.assert_close(scheduler.timesteps, 1000 * times, rtol=0, atol=2e-3)
    torch.testing.assert_close(scheduler.sigmas, torch.cat([times, torch.zeros(1)]), rtol=0, atol=2e-6)


def test_published_times_of_sd35_large():
    scheduler, told = few_step_scheduler((1000 * flow_times(4, 5.0)[:-1]).tolist(), "ode", "flow", FLOW)
    scheduler.set_timesteps(4)
    assert told == {}
    assert [round(t.item(), 4) for t in scheduler.sigmas] == [1.0, 0.9376, 0.8336, 0.6259, 0.0]
    # What merely setting the shift would give, as the published demo does (T2).
    wrong = FlowMatchEulerDiscreteScheduler(shift=5.0)
    wrong.set_timesteps(4)
    assert (wrong.sigmas[:4] - scheduler.sigmas[:4]).abs().max() > 0.05


def test_times_that_no_shift_gives_are_told():
    scheduler, told = few_step_scheduler([1000.0, 990.0, 500.0, 450.0], "ode", "flow", FLOW)
    assert told == {"sigmas": [1.0, 0.99, 0.5, 0.45]}
    scheduler.set_timesteps(**told)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.99, 0.5, 0.45, 0.0]))
    assert stretched_shift(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), 1000) is None


@pytest.mark.parametrize(
    ("timesteps", "mode", "exact"),
    [
        ([399], "sde", True),
        ([399], "ode", True),
        ([999], "sde", True),
        ([999, 499], "sde", True),
        ([999, 749, 499, 249], "sde", True),
        ([999, 749, 499, 249], "ode", True),
        ([999, 749, 500, 250], "sde", False),
        ([999, 749, 500, 250], "ode", False),
        ([800, 400], "ode", False),
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_discrete_schedulers(timesteps, mode, exact, prediction_type):
    config = SDXL | {"prediction_type": prediction_type}
    scheduler, told = few_step_scheduler(timesteps, mode, prediction_type, config)
    assert told == ({} if exact else {"timesteps": timesteps})
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(**(told or {"num_inference_steps": len(timesteps)}))
    assert scheduler.timesteps.long().tolist() == timesteps
    base = DDPMScheduler.from_config(config).alphas_cumprod
    assert torch.equal(scheduler.alphas_cumprod[timesteps], base[timesteps])


def run(scheduler: Any, told: dict, n: int, x: torch.Tensor, network: Any, noises: list[torch.Tensor]) -> torch.Tensor:
    """What the loops of diffusers' pipelines do with a scheduler."""
    scheduler.set_timesteps(**(told or {"num_inference_steps": n}))
    x, noises = x * getattr(scheduler, "init_noise_sigma", 1.0), iter([*noises, torch.zeros_like(x)])
    with pytest.MonkeyPatch.context() as patch:
        for module in ("scheduling_lcm", "scheduling_flow_match_lcm"):
            patch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: next(noises))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network(scaled, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize(
    ("prediction_type", "timesteps"),
    [
        ("epsilon", [399]),
        ("epsilon", [999, 749, 499, 249]),
        ("epsilon", [999, 749, 500, 250]),
        ("v_prediction", [999, 749, 499, 249]),
        ("flow", (1000 * flow_times(4, 5.0)[:-1]).tolist()),
        ("flow", [1000.0]),
    ],
)
def test_trajectories_end_where_the_trained_ones_do(prediction_type, timesteps, mode):
    generator = torch.Generator().manual_seed(0)
    x, *noises = torch.randn(4, 2, 4, 3, 3, generator=generator)
    config = FLOW if prediction_type == "flow" else SDXL | {"prediction_type": prediction_type}
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod

    def network(x_t, t):
        return 0.6 * x_t + 0.2 * torch.sin(torch.pi * t / 1000).view(-1, 1, 1, 1)

    def coefficients(t):
        return (1 - t / 1000, t / 1000) if prediction_type == "flow" else (alphas[t].sqrt(), (1 - alphas[t]).sqrt())

    draws = iter(noises)
    clean = few_step_trajectory(
        x, torch.tensor(timesteps), network, coefficients, lambda: next(draws), prediction_type, mode
    )[1]
    scheduler, told = few_step_scheduler(timesteps, mode, prediction_type, config)
    found = run(scheduler, told, len(timesteps), x, network, noises)
    torch.testing.assert_close(found, clean[-1], rtol=1e-4, atol=1e-4)


def test_published_four_steps_of_sdxl_are_one_off_in_diffusers():
    """Why a recipe chooses 999, 749, 499, 249: no setting of LCM's scheduler gives 500 and 250."""
    assert epsilon_timesteps(4).tolist() == [999, 749, 500, 250]
    for steps in range(4, 1001):
        scheduler = LCM(original_inference_steps=steps)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() != [999, 749, 500, 250]


def test_a_rescaled_schedule_is_kept():
    config = dict(DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).config)
    scheduler, _ = few_step_scheduler([999, 749, 499, 249], "sde", "v_prediction", config)
    assert torch.equal(scheduler.alphas_cumprod, DDPMScheduler.from_config(config).alphas_cumprod)
