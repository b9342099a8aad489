"""The stochastic reverse step against golden numbers, diffusers' DDIM, and what it must do to a distribution."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.functional.steps import denoise, draw_step, log_probability, reverse_step
from tests.golden_cases import assert_within, case_names, load_case, manifest

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
ALPHAS_CUMPROD = DDIMScheduler(**SCHEDULE).alphas_cumprod


def coefficients(t: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    squared = ALPHAS_CUMPROD.to(dtype)[t]
    return squared.sqrt(), (1 - squared).sqrt()


def step_of_case(case: dict, params: dict, prediction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x_0, eps, mean and std of a golden case."""
    t, dtype = case["t"].expand(len(prediction)), prediction.dtype
    landing = (t - 1000 // params["num_steps"]).clamp(0, 999)
    now, then = coefficients(t, dtype), coefficients(landing, dtype)
    x_0, epsilon = denoise(params["scheduler"]["prediction_type"], prediction, case["x_t"], now)
    if params["scheduler"]["clip_sample"]:
        x_0 = x_0.clamp(-1, 1)
    return x_0, epsilon, *reverse_step(x_0, epsilon, now, then, params["eta"])


@pytest.mark.parametrize("name", case_names("spo", "schedule"))
def test_time_grid_and_noise_of_each_step_are_the_published_ones(name, sd15):
    case, params = load_case("spo", name)
    tolerance = manifest("spo")[name]["tolerance"]
    backbone = SD15(str(sd15))
    backbone.load()
    grid = backbone.time_grid(params["num_steps"])
    assert torch.equal(grid[:-1], case["timesteps"])
    assert torch.equal(grid[1:], case["prev_timesteps"])
    alpha, sigma = backbone.coefficients(grid)
    std = reverse_step(*torch.zeros(2, 1), (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]), params["eta"])[1]
    assert_within(tolerance["floats"], std, case["sigma"])
    assert_within(tolerance["floats"], backbone.alphas.square(), case["alphas_cumprod"])
    assert_within(tolerance["floats"], alpha[:-1].square(), case["alpha_t"])
    assert_within(tolerance["floats"], alpha[1:].square(), case["alpha_prev"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", case_names("spo", "logprob"))
def test_log_probability_of_a_transition(name, dtype):
    case, params = load_case("spo", name)
    tolerance = manifest("spo")[name]["tolerance"]
    prediction = case["eps"].to(dtype).requires_grad_()
    _, _, mean, std = step_of_case(case, params, prediction)
    log_prob = log_probability(case["x_prev"], mean, std)
    (gradient,) = torch.autograd.grad(log_prob.sum(), prediction)
    assert log_prob.dtype == dtype
    assert_within(tolerance["mean"], mean, case["mean"])
    assert_within(tolerance["std"], std, case["std"])
    assert_within(tolerance["log_prob"], log_prob, case["log_prob"])
    assert_within(tolerance["grad_eps"], gradient, case["grad_eps"])


@pytest.mark.parametrize("name", case_names("spo", "split_step"))
def test_candidates_of_one_step_share_their_mean(name):
    case, params = load_case("spo", name)
    tolerance = manifest("spo")[name]["tolerance"]["all"]
    x_0, epsilon, mean, std = step_of_case(case, params, case["eps"])
    candidates = draw_step(mean, std, case["noise"].reshape(-1, *mean.shape[1:]))
    assert_within(tolerance, x_0, case["x0"])
    assert_within(tolerance, epsilon, case["pred_eps"])
    assert_within(tolerance, candidates.reshape(case["x_prev"].shape), case["x_prev"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_equals_diffusers_ddim(eta, prediction_type):
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type)
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    x, prediction, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for t in scheduler.timesteps:
        expected = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
        now, then = (coefficients(s.expand(2), torch.float64) for s in (t, (t - 50).clamp(min=0)))
        step = reverse_step(*denoise(prediction_type, prediction, x, now), now, then, eta)
        torch.testing.assert_close(draw_step(*step, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_flow_keeps_the_noise_level_of_the_time_it_lands_on(eta):
    """x_0 and noise known: x_s then is alpha_s x_0 plus noise of standard deviation sigma_s, whatever eta is."""
    t, s = torch.tensor([0.7, 0.2], dtype=torch.float64)
    now, then = (1 - t[None], t[None]), (1 - s[None], s[None])
    x_0, noise = torch.full((2, 1, 200_000), 3.0, dtype=torch.float64), torch.randn(2, 1, 200_000, dtype=torch.float64)
    x_t = now[0] * x_0 + now[1] * noise
    step = reverse_step(*denoise("flow", noise - x_0, x_t, now), now, then, eta)
    x_s = draw_step(*step, torch.randn_like(noise))
    assert x_s.mean().item() == pytest.approx(0.8 * 3.0, abs=0.002)
    assert x_s.std().item() == pytest.approx(0.2, rel=0.005)
    assert step[1].item() == pytest.approx(eta * math.sqrt(0.04 / 0.49 * (0.49 - (0.3 / 0.8) ** 2 * 0.04)))


def test_log_probability_is_a_mean_of_normal_densities():
    x, mean, std = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5])
    normal = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(log_probability(x, mean, std), normal.log_prob(x).mean(1))
    assert log_probability(x, mean, std).item() == pytest.approx(0.5 * (0 - 2.0) - math.log(0.5) - 0.918939, abs=1e-6)


def test_gradient_flows_through_the_mean_only():
    x, mean = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    log_probability(x, mean, torch.ones(2)).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(mean.grad, (x - mean).detach() / 3)
