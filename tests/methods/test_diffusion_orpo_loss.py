"""The Diffusion-ORPO loss: hand-made values, the published programs' numbers, finite everywhere, and the right sign."""

import itertools
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from lightning_modules.diffusion_orpo import (
    LogOdds,
    diffusion_orpo_loss,
    log_expm1,
    mapo_log_odds,
    mapo_score,
    margin_by_quarter,
    margin_log_odds,
    odds_ratio_log_odds,
    reference_log_odds,
)
from lightning_modules.functional.noise import add_noise, per_sample_mse, regression_target, repeat_pair
from tests.golden_cases import case_names, load_case

LOG_ODDS: dict[str, LogOdds] = {
    "margin": margin_log_odds,
    "steep margin": partial(margin_log_odds, scale=250.0),
    "odds_ratio": odds_ratio_log_odds,
    "mapo": mapo_log_odds,
    "reference": reference_log_odds,
}
ERRORS = (0.0, 1e-12, 1e-8, 1e-6, 1e-3, math.log(2), 1.0, 89.0, 1000.0)


def loss_of(error: Tensor, log_odds: LogOdds, beta: float, **options) -> Tensor:
    """Mean loss over the pairs."""
    supervised, preference, _ = diffusion_orpo_loss(error, log_odds, beta, **options)
    return supervised.mean() + preference.mean()


def loss_and_gradient(prediction: Tensor, target: Tensor, log_odds: LogOdds, beta: float) -> tuple[Tensor, Tensor]:
    prediction = prediction.clone().requires_grad_()
    loss = loss_of(per_sample_mse(prediction, target), log_odds, beta)
    loss.backward()
    return loss.detach(), prediction.grad


def assert_share(actual: Tensor, expected: Tensor, share: float) -> None:
    """max|difference| <= share * max|expected|."""
    assert (actual.double() - expected.double()).abs().max() <= share * expected.double().abs().max()


# ------------------------------------------------------------------------------------------------- values and direction

# Loss, d loss / d w and d loss / d l of one pair at beta 0.1 (spec, section 3.2), to the digits given there.
TABLE = [
    ("reference", 0.001, 0.002, 0.0704, 0.950, 0.050),
    ("reference", 0.12, 0.1, 0.1883, 0.951, 0.050),
    ("reference", 1.0, 200.0, 20.9, 0.900, 0.100),
    ("margin", 0.001, 0.002, 0.0703, 1.050, -0.050),
    ("margin", 0.1, 0.2, 0.1644, 1.048, -0.048),
    ("margin", 1.0, 200.0, 1.0, 1.0, 0.0),
    ("odds_ratio", 0.001, 0.001, 0.0703, 51.03, -50.03),
    ("odds_ratio", 0.01, 0.02, 0.0504, 4.34, -1.68),
    ("odds_ratio", 0.12, 0.1, 0.1994, 1.48, -0.576),
    ("odds_ratio", 50.0, 60.0, 50.0, 1.0, 0.0),
    ("mapo", 0.001, 0.002, 0.0586, 11.94, -10.94),
    ("mapo", 0.12, 0.1, 0.6116, 25.3, -24.4),
    ("mapo", 0.5, 0.5, 0.5693, 12.46, -11.46),
    ("mapo", 50.0, 60.0, 50.07, 1.0, 0.0),
]


@pytest.mark.parametrize(("variant", "w", "l", "loss", "d_w", "d_l"), TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_of_known_errors(variant, w, l, loss, d_w, d_l, dtype):  # noqa: E741
    error = torch.tensor([w, l], dtype=dtype, requires_grad=True)
    value = loss_of(error, LOG_ODDS[variant], 0.1)
    value.backward()
    assert value.dtype == dtype
    assert value.item() == pytest.approx(loss, rel=1e-2)
    assert error.grad.tolist() == pytest.approx([d_w, d_l], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("variant", LOG_ODDS)
def test_the_term_is_beta_log_two_when_the_errors_are_equal(variant):
    supervised, preference, odds = diffusion_orpo_loss(torch.tensor([0.3, 0.3]), LOG_ODDS[variant], beta=0.2)
    assert supervised.item() == pytest.approx(0.3)
    assert preference.item() == pytest.approx(0.2 * math.log(2))
    assert odds.item() == 0.0


@pytest.mark.parametrize("variant", LOG_ODDS)
@pytest.mark.parametrize("errors", [(0.01, 0.01), (0.01, 0.015), (0.3, 0.29), (1.5, 1.6)])
def test_the_gradient_raises_the_rejected_error_and_with_the_reference_lowers_it(variant, errors):
    error = torch.tensor(errors, dtype=torch.float64, requires_grad=True)
    loss_of(error, LOG_ODDS[variant], beta=0.1).backward()
    d_w, d_l = error.grad
    if variant == "reference":
        assert d_l > 0
        assert d_w < 1  # fine-tuning alone has 1: the term works against it
    else:
        assert d_l < 0
        assert d_w > 1


@pytest.mark.parametrize("variant", LOG_ODDS)
def test_value_and_gradient_are_finite_and_signed_at_every_error(variant):
    """All 81 combinations, alone (a batch of one) and together, with and without a label."""
    pairs = torch.tensor(list(itertools.product(ERRORS, ERRORS)))
    columns = [pair.clone() for pair in pairs] + [pairs.T.flatten()]
    for errors, label in itertools.product(columns, (None, 0.5, 1.0)):
        error = errors.requires_grad_()
        error.grad = None
        labels = None if label is None else torch.full((len(error) // 2,), label)
        loss = loss_of(error, LOG_ODDS[variant], beta=0.1, label=labels)
        loss.backward()
        assert torch.isfinite(loss), errors
        assert torch.isfinite(error.grad).all(), (errors, error.grad)
        if label != 0.5:
            d_w, d_l = error.grad.chunk(2)
            assert (d_w > 0).all()
            assert (d_l >= 0 if variant == "reference" else d_l <= 0).all()


def test_the_odds_ratio_has_no_gradient_up_to_the_floor():
    error = torch.tensor([1e-6, 2e-6, 1e-7, 1e-6], requires_grad=True)
    _, preference, odds = diffusion_orpo_loss(error, odds_ratio_log_odds, beta=0.1)
    preference.sum().backward()
    assert error.grad.tolist()[:1] + error.grad.tolist()[2:] == [0.0, 0.0, 0.0]
    assert error.grad[1] > 0.1 * 0.1 / 2e-6  # just above it, about beta sigmoid / m
    assert odds[0].item() == 0.0
    error = torch.tensor([1e-4, 2e-4], requires_grad=True)
    diffusion_orpo_loss(error, partial(odds_ratio_log_odds, mse_floor=1e-3), 0.1)[1].sum().backward()
    assert error.grad.tolist() == [0.0, 0.0]


def test_swapping_the_images_negates_the_log_odds():
    error = torch.rand(6)
    for log_odds in LOG_ODDS.values():
        plain, swapped = (diffusion_orpo_loss(e, log_odds, 1.0)[2] for e in (error, error.roll(3)))
        torch.testing.assert_close(swapped, -plain)


@pytest.mark.parametrize("variant", LOG_ODDS)
def test_labels_mix_the_losses_of_both_orders(variant):
    error = torch.tensor([0.2, 0.5, 0.3, 0.1])
    terms = diffusion_orpo_loss(error, LOG_ODDS[variant], 0.1)
    plain = terms[0] + terms[1]
    swapped = sum(diffusion_orpo_loss(error.roll(2), LOG_ODDS[variant], 0.1)[:2])
    mixed = sum(diffusion_orpo_loss(error, LOG_ODDS[variant], 0.1, label=torch.tensor([0.75, 0.5]))[:2])
    torch.testing.assert_close(mixed, torch.tensor([0.75, 0.5]) * plain + torch.tensor([0.25, 0.5]) * swapped)
    sure = diffusion_orpo_loss(error, LOG_ODDS[variant], 0.1, label=torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(sure, terms, strict=True))


@pytest.mark.parametrize("variant", ["margin", "odds_ratio", "mapo"])
def test_above_its_limit_the_rejected_error_is_left_alone(variant):
    for rejected, moves in ((0.4, True), (0.6, False)):
        error = torch.tensor([0.5, rejected], requires_grad=True)
        loss_of(error, LOG_ODDS[variant], 0.1, rejected_error_limit=0.5).backward()
        assert (error.grad[1] != 0) == moves
        assert error.grad[0] > 1  # the preferred one is still told apart
    error = torch.tensor([0.6, 0.2], requires_grad=True)  # label 0: the first image is the rejected one
    loss_of(error, LOG_ODDS[variant], 0.1, label=torch.zeros(1), rejected_error_limit=0.5).backward()
    assert error.grad[0] == 0


def test_stable_forms_agree_with_float64():
    m = torch.logspace(-12, 3, 61, dtype=torch.float64)
    exact = torch.where(m > 30, m, m.clamp_max(30).expm1().log())
    torch.testing.assert_close(log_expm1(m), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_expm1(m.float()), exact.float(), rtol=1e-6, atol=1e-6)
    x = torch.cat([torch.zeros(1, dtype=torch.float64), m]).requires_grad_()
    value = mapo_score(x)
    slope = torch.autograd.grad(value.sum(), x)[0]
    assert value[0] == 1
    assert slope[0] == -0.5
    torch.testing.assert_close(value[1:], m / m.clamp_max(700).expm1(), rtol=1e-12, atol=1e-15)
    x32 = x.detach().float().requires_grad_()
    torch.testing.assert_close(mapo_score(x32), value.float(), rtol=0, atol=2e-7)
    torch.testing.assert_close(torch.autograd.grad(mapo_score(x32).sum(), x32)[0], slope.float(), rtol=0, atol=4e-6)


def test_mapos_branches_meet():
    at = torch.tensor(0.05, dtype=torch.float64)
    assert mapo_score(at * (1 - 1e-15)).item() == pytest.approx(0.05 / math.expm1(0.05), rel=1e-15)


def test_the_quarters_of_the_timesteps_add_up_to_the_margin():
    margin, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), torch.tensor([0, 249, 250, 500, 999, 750])
    quarters = margin_by_quarter(margin, t, 1000)
    assert (6 * quarters).tolist() == [3.0, 4.0, 8.0, 48.0]


def test_quarters_of_a_flow_end_at_pure_noise():
    quarters = margin_by_quarter(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 249.9, 250.0, 1000.0]), 1000)
    assert (4 * quarters).tolist() == [3.0, 4.0, 0.0, 8.0]


# --------------------------------------------------------------------------------------------- the published programs


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "ref_loss_"))
def test_golden_published_loss(case):
    tensors, about = load_case("diffusion_orpo", case)
    beta = tensors["beta"].item()
    error = per_sample_mse(tensors["model_pred"], tensors["target"])
    assert error.dtype == torch.float32
    preferred, rejected = error.chunk(2)
    supervised, preference, odds = diffusion_orpo_loss(error, reference_log_odds, beta)
    for name, actual in {
        "model_losses_w": preferred,
        "model_losses_l": rejected,
        "ratio": F.logsigmoid(odds),
        "ratio_losses": -preference,
        "loss": supervised.mean() + preference.mean(),
    }.items():
        torch.testing.assert_close(actual, tensors[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(odds, tensors["log_odds"], rtol=0, atol=2e-6 * max(1.0, error.max().item()))

    _, gradient = loss_and_gradient(tensors["model_pred"], tensors["target"], reference_log_odds, beta)
    share = float(re.search(r"<= ([\d.e-]+) \* max", about["tolerance"]["grad_model_pred"])[1])
    assert_share(gradient, tensors["grad_model_pred"], share)


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "ref_loss_"))
def test_reference_is_the_published_loss_bit_for_bit(case):
    tensors, _ = load_case("diffusion_orpo", case)
    prediction, beta = tensors["model_pred"].clone().requires_grad_(), tensors["beta"].item()
    squares = F.mse_loss(prediction.float(), tensors["target"].float(), reduction="none")
    w, l = squares.mean(dim=[1, 2, 3]).chunk(2)  # noqa: E741
    published = w.mean() - (beta * F.logsigmoid(w - l)).mean()
    published.backward()
    loss, gradient = loss_and_gradient(tensors["model_pred"], tensors["target"], reference_log_odds, beta)
    assert torch.equal(loss, published.detach())
    assert torch.equal(gradient, prediction.grad)


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "ref_loss_"))
def test_golden_margin_is_the_published_loss_with_the_other_sign(case):
    tensors, _ = load_case("diffusion_orpo", case)
    prediction, target, beta = tensors["model_pred"], tensors["target"], tensors["beta"].item()
    for dtype, share in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        loss, gradient = loss_and_gradient(prediction.to(dtype), target.to(dtype), margin_log_odds, beta)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), tensors["corrected_loss_f64"], rtol=share, atol=0)
        assert_share(gradient, tensors["corrected_grad_model_pred_f64"], share)
    odds = diffusion_orpo_loss(per_sample_mse(prediction.double(), target.double()), margin_log_odds, beta)[2]
    torch.testing.assert_close(odds, tensors["corrected_log_odds_f64"], rtol=1e-10, atol=1e-15)

    published = tensors["grad_model_pred"].double()
    assert (gradient - published).abs().max() > 0.25 * beta / (1 + beta) * published.abs().max()


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "oddsratio_"))
def test_golden_odds_ratio(case):
    tensors, _ = load_case("diffusion_orpo", case)
    prediction, target, beta = tensors["model_pred"], tensors["target"], tensors["beta"].item()
    log_odds = partial(odds_ratio_log_odds, mse_floor=1e-30)  # the cases have none
    double = per_sample_mse(prediction.double(), target.double())
    odds = diffusion_orpo_loss(double, log_odds, beta)[2]
    torch.testing.assert_close(odds, tensors["log_odds_f64"], rtol=1e-9, atol=1e-12)
    loss, gradient = loss_and_gradient(prediction.double(), target.double(), log_odds, beta)
    torch.testing.assert_close(loss, tensors["loss_f64"], rtol=1e-9, atol=0)
    assert_share(gradient, tensors["grad_model_pred_f64"], 1e-9)

    error = per_sample_mse(prediction, target)
    preferred, rejected = error.chunk(2)
    _, preference, odds = diffusion_orpo_loss(error, log_odds, beta)
    loss, gradient = loss_and_gradient(prediction, target, log_odds, beta)
    rounding = 1e-4 if error.min() < 1e-4 else 1e-5 + 1e-6 * max(1.0, error.max().item())
    torch.testing.assert_close(odds.double(), tensors["log_odds_f64"], rtol=0, atol=rounding)
    torch.testing.assert_close(loss.double(), tensors["loss_f64"], rtol=1e-5, atol=0)
    assert_share(gradient, tensors["grad_model_pred_f64"], 1e-4)
    for name, actual in {
        "model_losses_w": preferred,
        "model_losses_l": rejected,
        "trl_ratio_losses": -preference,
        "trl_chosen_rewards": -beta * preferred,
        "trl_rejected_rewards": -beta * rejected,
        "trl_mean_ratio": F.logsigmoid(odds).mean(),
        "trl_mean_log_odds": odds.mean(),
        "trl_loss": loss,
    }.items():
        torch.testing.assert_close(actual.float(), tensors[name], rtol=2e-5, atol=1e-6)
    assert_share(gradient, tensors["trl_grad_model_pred"], 2e-5)


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "mapo_"))
def test_golden_mapo(case):
    tensors, about = load_case("diffusion_orpo", case)
    prediction, target = tensors["model_pred"], tensors["target"]
    beta, k, t_scale = (tensors[name].item() for name in ("beta", "k", "num_train_timesteps"))
    log_odds = partial(mapo_log_odds, k=k, t_scale=t_scale)
    double = per_sample_mse(prediction.double(), target.double())
    odds = diffusion_orpo_loss(double, log_odds, beta)[2]
    torch.testing.assert_close(odds / t_scale, tensors["log_odds_f64"], rtol=1e-9, atol=1e-14)
    loss, gradient = loss_and_gradient(prediction.double(), target.double(), log_odds, beta)
    torch.testing.assert_close(loss, tensors["loss_f64"], rtol=1e-9, atol=0)
    assert_share(gradient, tensors["grad_model_pred_f64"], 1e-9)

    error = per_sample_mse(prediction, target)
    preferred, rejected = error.chunk(2)
    loss, gradient = loss_and_gradient(prediction, target, log_odds, beta)
    torch.testing.assert_close(loss.double(), tensors["loss_f64"], rtol=1e-4, atol=0)
    assert_share(gradient, tensors["grad_model_pred_f64"], 1e-3)
    torch.testing.assert_close(preferred, tensors["model_losses_w"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rejected, tensors["model_losses_l"], rtol=1e-5, atol=1e-7)
    if error.min() >= 0.05:  # below, upstream's own numbers are off
        preference = diffusion_orpo_loss(error, log_odds, beta)[1]
        torch.testing.assert_close(loss, tensors["upstream_loss"], rtol=2e-3, atol=0)
        torch.testing.assert_close(-preference, tensors["upstream_ratio_losses"], rtol=2e-3, atol=1e-4)
        assert mapo_score(k * preferred).mean().item() == pytest.approx(about["logged"]["Win Score"], rel=1e-5)
        assert mapo_score(k * rejected).mean().item() == pytest.approx(about["logged"]["Lose Score"], rel=1e-5)


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "noising_"))
def test_golden_noising(case):
    tensors, about = load_case("diffusion_orpo", case)
    noise, t = repeat_pair(tensors["noise_half"]), repeat_pair(tensors["timesteps_half"])
    assert torch.equal(noise, tensors["noise"])
    assert torch.equal(t, tensors["timesteps"])
    abar = DDPMScheduler(**about["scheduler"]).alphas_cumprod[t].double()
    coefficients = abar.sqrt().float(), (1 - abar).sqrt().float()
    noised = add_noise(tensors["latents"], noise, *coefficients)
    target = regression_target(about["prediction_type"], tensors["latents"], noise, *coefficients)
    torch.testing.assert_close(noised, tensors["noisy_model_input"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, tensors["target"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", LOG_ODDS)
def test_half_precision_predictions_give_float32_losses(variant, dtype):
    prediction, target = torch.rand(2, 4, 3, 5).to(dtype), torch.rand(2, 4, 3, 5)
    loss, gradient = loss_and_gradient(prediction, target, LOG_ODDS[variant], 0.1)
    expected, _ = loss_and_gradient(prediction.float(), target, LOG_ODDS[variant], 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert gradient.dtype == dtype
