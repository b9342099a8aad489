"""DMDR's formulas: equal to what the published programs computed, and the values known by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.dmdr import (
    distribution_matching,
    draw_guidance,
    draw_renoise_times,
    dynamic_decay,
    generator_input,
    renoise_law_at,
    teacher_scale_at,
    uniform_times,
    updates_generator,
)
from lightning_modules.functional.few_step import (
    clean_estimate,
    discrete_timesteps,
    epsilon_timesteps,
    few_step_trajectory,
    flow_times,
)
from lightning_modules.functional.noise import add_noise, guide, per_sample_mse, regression_target, to_epsilon
from tests.golden_cases import load_case

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the manifest's tolerance where it says nothing else
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)


def case_of(name: str) -> dict[str, Tensor]:
    return load_case("dmdr", name)[0]


def epsilon_coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    return ALPHAS[t.long()].sqrt().float(), (1 - ALPHAS[t.long()]).sqrt().float()


def flow_coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t, t


# ------------------------------------------------------------------------------------------------ distribution matching


@pytest.mark.parametrize("name", ["dmd_eps_cfg", "dmd_eps_nocfg", "dmd_flow_t2i", "dmd_flow_class"])
def test_distribution_matching_equals_the_published_step(name):
    case = case_of(name)
    flow, x0 = "flow" in name, case["x0"].requires_grad_()
    if flow:
        v, coefficients, end = "v", flow_coefficients(case["t"].flatten()), case["t_end"].item()
    else:
        v, coefficients, end = "eps", (case["alpha_bar"].sqrt(), (1 - case["alpha_bar"]).sqrt()), 0.0
    kind = "flow" if flow else "epsilon"
    with torch.no_grad():
        x_t = add_noise(x0, case["noise"], *coefficients)
        guidance = case["cfg_scale"].item()
        real = case[f"{v}_real_cond"]
        if guidance > 1:
            real = guide(case[f"{v}_real_uncond"], real, guidance)
        teacher = clean_estimate(kind, real, x_t, *coefficients, end)
        fake = clean_estimate(kind, case[f"{v}_fake"], x_t, *coefficients, end)
    loss, direction, replaced = distribution_matching(x0, teacher, fake)
    loss.mean().backward()

    high = {"rtol": 1e-4, "atol": 1e-3 if not flow else 1e-5}
    torch.testing.assert_close(x_t, case["x_t"], **CLOSE)
    torch.testing.assert_close(real, case[f"{v}_real"], **CLOSE)
    torch.testing.assert_close(teacher, case["x0_real"], **high)
    torch.testing.assert_close(fake, case["x0_fake"], **high)
    torch.testing.assert_close(direction, case["grad"], rtol=1e-4 if flow else 1e-3, atol=1e-4)
    torch.testing.assert_close(loss.mean(), case["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x0.grad, case["dloss_dx0"], rtol=1e-4 if flow else 1e-3, atol=1e-6)
    torch.testing.assert_close(x0.grad, direction / x0.numel(), rtol=1e-4, atol=1e-8)
    assert replaced == 0
    if "real_lora_scale" in case:
        scale = teacher_scale_at(
            case["global_step"].item(), case["dynamic_step"].item(), case["real_lora_scale_start"].item()
        )
        assert scale == pytest.approx(case["real_lora_scale"].item(), rel=1e-6)


def test_the_direction_leads_from_the_fake_score_to_the_teacher():
    x0 = torch.zeros(1, 1, 1, 2, requires_grad=True)
    teacher, fake = torch.tensor([[[[1.0, -3.0]]]]), torch.tensor([[[[-1.0, -3.0]]]])
    loss, direction, _ = distribution_matching(x0, teacher, fake)
    loss.mean().backward()
    assert direction.flatten().tolist() == [-1.0, 0.0]  # (fake - teacher) / mean(1, 3)
    assert (x0 - x0.grad).flatten().tolist() == [0.5, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["teacher", "fake"])
def test_a_sample_that_a_score_cannot_judge_teaches_nothing_and_is_counted(who, bad):
    torch.manual_seed(0)
    x0 = torch.randn(2, 1, 2, 2, requires_grad=True)
    scores = {"teacher": torch.randn(2, 1, 2, 2), "fake": torch.randn(2, 1, 2, 2)}
    alone = distribution_matching(x0[1:], scores["teacher"][1:], scores["fake"][1:])[1]
    scores[who][0] = bad
    loss, direction, replaced = distribution_matching(x0, scores["teacher"], scores["fake"])
    loss.mean().backward()
    assert replaced == 4
    assert x0.grad[0].abs().max() == 0
    assert torch.equal(direction[1:], alone)
    assert x0.grad.isfinite().all()


def test_the_direction_is_float32_and_a_perfect_sample_does_not_divide_by_zero():
    x0 = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    _, direction, replaced = distribution_matching(x0, x0, x0 + 0.5)
    assert direction.dtype == torch.float32
    assert replaced == 0  # in float16 the 1e-8 would be 0, and the direction infinite
    assert direction.flatten().tolist() == pytest.approx([5e7] * 4)


# -------------------------------------------------------------------------------------------------- schedules and draws


@pytest.mark.parametrize("name", ["schedules_2000", "schedules_static"])
def test_dynamic_schedules_equal_the_published_ones(name):
    case = case_of(name)
    dynamic = case["dynamic_step"].item()
    for number, step in enumerate(case["steps"].tolist()):
        law = renoise_law_at(step, dynamic, case["alpha0"].item(), case["beta0"].item())
        assert law == pytest.approx((case["alpha"][number].item(), case["beta"][number].item()), rel=1e-5)
        scale = teacher_scale_at(step, dynamic, case["scale0"].item())
        assert scale == pytest.approx(case["real_lora_scale"][number].item(), rel=1e-6)
        torch.manual_seed(step)
        quantiles = draw_renoise_times(100_000, "beta", *law).quantile(case["probs"])
        torch.testing.assert_close(quantiles, case["quantiles_exact"][number].float(), rtol=0, atol=0.01)


def test_schedules_at_points_known_by_hand():
    assert [renoise_law_at(g, 2000, 4.0, 1.5) for g in (0, 1000, 2000, 9999)] == [
        (4.0, 1.5),
        pytest.approx((2.5, 1.25)),
        (1.0, 1.0),
        (1.0, 1.0),
    ]
    assert [teacher_scale_at(g, 2000, 0.5) for g in (0, 1000, 2000)] == [0.5, pytest.approx(0.25), 0.0]
    assert dynamic_decay(500, 2000) == pytest.approx(0.853553, abs=1e-6)
    assert teacher_scale_at(0, 0, 0.5) == 0.0  # no dynamic phase
    assert renoise_law_at(5, 0, 4.0, 1.5) == (4.0, 1.5)


def test_uniform_times_and_their_timesteps_equal_the_published_ones():
    case = case_of("uniform_timesteps")
    times = uniform_times(case["u"])
    torch.testing.assert_close(times, case["t"], rtol=0, atol=1e-7)
    assert torch.equal(discrete_timesteps(times), case["timesteps_fp32"])


@pytest.mark.parametrize("law", ["beta", "uniform"])
def test_renoise_times_never_lie_beyond_the_end_of_a_flow(law):
    torch.manual_seed(0)
    times = draw_renoise_times(100_000, law, 0.3, 0.3)
    assert times.min() >= 0.001  # below, (0.001 - t) would reverse the direction
    assert times.max() <= 1.0
    assert times.dtype == torch.float32


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="known are uniform and beta"):
        draw_renoise_times(1, "logit_normal")


def test_guidance_is_drawn_around_its_scale():
    torch.manual_seed(0)
    draws = [draw_guidance(7.0, 0.5) for _ in range(500)]
    assert 6.5 <= min(draws) < 6.52
    assert 7.48 < max(draws) <= 7.5
    assert [draw_guidance(scale, 0.5) for scale in (1.0, 0.0)] == [1.0, 0.0]


def test_the_student_is_updated_at_every_ratio_th_inner_step_but_the_first():
    case = case_of("cadence_ratio5")
    generator_step, every = 0, int(case["checkpoint_steps"])
    saved = {"published": set(), "here": set()}
    for inner, before, updated, inner_after, after, checkpoint, _ in case["rows"].tolist():
        turn = updates_generator(inner, int(case["ratio"]))
        assert (before, turn) == (generator_step, bool(updated))
        generator_step += turn
        assert (inner + 1, generator_step) == (inner_after, after)
        if checkpoint:
            saved["published"].add(after)
        if turn and generator_step % every == 0:  # ModelCheckpoint's rule: at the update, not ratio - 1 steps later
            saved["here"].add(after)
    assert saved["published"] == saved["here"]


# --------------------------------------------------------------------------------------------- conversions, the sampler


def test_conversions_of_noise_predictions_equal_the_published_ones():
    case = case_of("conversions_eps")
    torch.testing.assert_close(ALPHAS.float(), case["alphas_cumprod"], rtol=1e-5, atol=0)
    coefficients = epsilon_coefficients(case["timesteps"])
    x_t = add_noise(case["x0"], case["noise"], *coefficients)
    torch.testing.assert_close(x_t, case["x_t"], **CLOSE)
    x0 = clean_estimate("epsilon", case["eps_pred"], case["x_t"], *coefficients, end=0.3)  # a flow's end says nothing
    torch.testing.assert_close(x0, case["x0_hat"], rtol=1e-4, atol=1e-3)
    below = case["timesteps"] < 999
    torch.testing.assert_close(x0[below], case["x0_hat"][below], rtol=1e-4, atol=5e-5)
    half = clean_estimate("epsilon", case["eps_pred"].half(), case["x_t"].half(), *coefficients)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, case["x0_hat_fp32_schedule"], rtol=1e-3, atol=0.02)


def test_conversions_of_flows_equal_the_published_ones():
    case, t = case_of("conversions_flow"), case_of("conversions_flow")["t"].flatten()
    close = {"rtol": 1e-5, "atol": 1e-6}
    alpha, sigma = flow_coefficients(t)
    torch.testing.assert_close(add_noise(case["x0"], case["noise"], alpha, sigma), case["x_t"], **close)
    target = regression_target("flow", case["x0"], case["noise"], alpha, sigma)
    torch.testing.assert_close(target, case["v_target"], **close)
    for name, end in (("t2i", 0.001), ("class", 0.0)):
        x0 = clean_estimate("flow", case["v_pred"], case["x_t"], alpha, sigma, end)
        torch.testing.assert_close(x0, case[f"x0_from_v_{name}"], **close)
    epsilon = to_epsilon("flow", case["v_pred"], case["x_t"], alpha, sigma)
    torch.testing.assert_close(epsilon, case["eps_from_v"], **close)
    assert torch.equal((1000 * t).round(), case["told_fp32"])


def test_times_of_the_few_steps():
    assert epsilon_timesteps(4).tolist() == [999, 749, 500, 250]
    assert epsilon_timesteps(1).tolist() == [399]
    assert epsilon_timesteps(2).tolist() == [999, 500]
    assert epsilon_timesteps(4, shift=3.0).tolist() == [999, 900, 750, 500]
    assert flow_times(4, 3.0).tolist() == pytest.approx([1, 0.9001, 0.7504, 0.5010, 0.001], abs=1e-4)
    assert flow_times(4, 5.0).tolist() == pytest.approx([1, 0.9376, 0.8336, 0.6259, 0.001], abs=1e-4)
    assert flow_times(2, 1.0, end=0.0).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", ["sampler_eps_1step", "sampler_eps_4step", "sampler_eps_4step_fp16"])
def test_the_sampler_of_noise_predictions_equals_the_published_one(name):
    case = case_of(name)
    timesteps, told = epsilon_timesteps(len(case["noises"])), []
    assert timesteps.tolist() == case["t_steps"].tolist()
    torch.testing.assert_close(ALPHAS[timesteps].float(), case["alphas_cumprod_at_t"], rtol=1e-5, atol=0)
    c0, c1, c2 = case["coef"].tolist()
    text, noises = case["prompt_embeds"].mean((1, 2)), iter(case["noises"])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        wave = torch.sin(math.pi * t / 1000)
        return c0 * x + (c1 * wave + c2 * text)[:, None, None, None]

    _, clean = few_step_trajectory(
        case["init"], timesteps, predict, epsilon_coefficients, lambda: next(noises), "epsilon"
    )
    half = case["init"].dtype == torch.float16
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if half else CLOSE
    torch.testing.assert_close(torch.stack(clean), case["all_x0"].float(), **tolerance)
    assert torch.equal(torch.stack(told), case["model_timesteps"])


@pytest.mark.parametrize("name", ["sampler_flow_ode_s5", "sampler_flow_sde_s3", "sampler_flow_ode_s3_bf16"])
def test_the_samplers_of_flows_equal_the_published_ones(name):
    case = case_of(name)
    mode = name.split("_")[2]
    times, told = flow_times(len(case["noises"]), case["shift"].item()), []
    c0, c1, c2 = case["coef"].tolist()
    text, noises = case["prompt_embeds"].float().mean((1, 2)), iter(case["noises"])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        told.append((1000 * t).round())
        wave = torch.sin(math.pi * told[-1] / 1000)
        return c0 * x + (c1 * wave + c2 * text)[:, None, None, None]

    inputs, clean = few_step_trajectory(
        case["init"].float(), times[:-1], predict, flow_coefficients, lambda: next(noises), "flow", mode, end=0.001
    )
    if mode == "ode":
        clean = [clean[-1]] * len(clean)
    if "bf16" in name:  # the published times are rounded to bfloat16; here they never are
        assert torch.equal(times[:-1].bfloat16().float(), case["t_steps"])
        torch.testing.assert_close(torch.stack(clean), case["all_x0"].float(), rtol=3e-2, atol=3e-2)
        return
    torch.testing.assert_close(torch.stack(clean), case["all_x0"], **CLOSE)
    torch.testing.assert_close(times[:-1], case["t_steps"], rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.stack(told), case["model_timesteps"])
    assert len(inputs) == 4


def test_the_sampler_of_the_class_conditional_flow_equals_the_published_one():
    case = case_of("sampler_class_1step")
    times = flow_times(1, case["shift"].item(), end=0.0)
    told = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return 0.6 * x + (0.2 * torch.sin(math.pi * t) + 0.05 * case["y"])[:, None, None, None]

    _, clean = few_step_trajectory(case["init"], times[:-1], predict, flow_coefficients, None, "flow")
    torch.testing.assert_close(torch.stack(clean), case["all_x0"], **CLOSE)
    torch.testing.assert_close(clean[-1], case["x_final"], **CLOSE)
    torch.testing.assert_close(torch.stack(told), case["model_times"])


def test_a_trajectory_that_stops_says_what_the_next_step_would_be_given():
    grid, x = torch.tensor([1.0, 0.6, 0.2]), torch.randn(2, 1, 2, 2)

    def go(steps: int | None, mode: str):
        torch.manual_seed(1)
        draw = lambda: torch.randn(2, 1, 2, 2)  # noqa: E731
        return few_step_trajectory(x, grid, lambda x, t: 0.5 * x, flow_coefficients, draw, "flow", mode, steps=steps)

    for mode in ("sde", "ode"):
        whole = go(None, mode)
        assert [len(part) for part in whole] == [3, 3]
        for steps in (0, 1, 2):
            inputs, clean = go(steps, mode)
            assert [len(inputs), len(clean)] == [steps + 1, steps]
            assert all(torch.equal(a, b) for a, b in zip(inputs, whole[0], strict=False))


def test_an_ode_step_of_a_flow_is_eulers():
    x, grid = torch.randn(2, 1, 2, 2), torch.tensor([0.9, 0.4])
    inputs, clean = few_step_trajectory(
        x, grid, lambda x, t: torch.ones_like(x), flow_coefficients, None, "flow", "ode", end=0.1
    )
    torch.testing.assert_close(inputs[1], x - 0.5)
    torch.testing.assert_close(clean[1], x - 0.5 - 0.3)


# --------------------------------------------------------------------------------------- the student, the fake score


@pytest.mark.parametrize("name", ["gen_input_eps_4step", "gen_input_eps_1step", "gen_input_flow_4step"])
def test_the_students_input_equals_the_published_one(name):
    case = case_of(name)
    step = case["step_index"]
    rows = torch.arange(len(step))
    picked = case["all_x0"][step, rows]
    torch.testing.assert_close(picked, case["x0_picked"], rtol=0, atol=0)
    if "eps" in name:
        t = epsilon_timesteps(len(case["t_steps"]))[step]
        assert torch.equal(t, case["timesteps"])
        coefficients, first, pure = epsilon_coefficients(t), step == 0, case["pure_noise"]
    else:
        t = case["t_steps"][step]
        coefficients, first, pure = flow_coefficients(t), torch.zeros_like(step).bool(), case["noise"]
    x_in = generator_input(picked, case["noise"], *coefficients, first, pure)
    torch.testing.assert_close(x_in, case["x_in"], rtol=1e-5, atol=1e-6)
    if "flow" in name:
        # At the first step a flow's input is pure noise with and without the replacement.
        torch.testing.assert_close(generator_input(picked, case["noise"], *coefficients, step == 0, pure), x_in)
        x0 = clean_estimate("flow", case["v_gen"], x_in, *coefficients, 0.001)
        torch.testing.assert_close(x0, case["x0_out"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fake_loss_eps", "fake_loss_flow"])
def test_the_fake_scores_loss_equals_the_published_one(name):
    case = case_of(name)
    kind = "flow" if "flow" in name else "epsilon"
    if kind == "flow":
        coefficients, prediction = flow_coefficients(case["t"].flatten()), case["v_pred"]
    else:
        coefficients, prediction = epsilon_coefficients(case["timesteps"]), case["eps_pred"]
    prediction.requires_grad_()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(add_noise(case["x0"], case["noise"], *coefficients), case["x_t"], **close)
    target = regression_target(kind, case["x0"], case["noise"], *coefficients)
    per_sample = per_sample_mse(prediction, target)
    per_sample.mean().backward()
    torch.testing.assert_close(per_sample, case["per_sample"], **close)
    torch.testing.assert_close(per_sample.mean(), case["loss"], **close)
    torch.testing.assert_close(prediction.grad, case["dloss_dpred"], **close)


def test_adapters_act_with_the_published_strengths():
    """Rank r and alpha r for the score, rank 2R and alpha 4R for the student; the scale is given at every call."""
    from peft import LoraConfig, inject_adapter_in_model

    case = case_of("adapter_scales")
    W = case["W"]
    for name, factor in (("fake", 1), ("gen", 2)):
        A, B = case[f"A_{name}"], case[f"B_{name}"]
        network = torch.nn.Sequential(torch.nn.Linear(W.shape[1], W.shape[0], bias=False))
        inject_adapter_in_model(LoraConfig(r=len(A), lora_alpha=factor * len(A), target_modules=["0"]), network)
        layer = network[0]
        with torch.no_grad():
            layer.base_layer.weight.copy_(W)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
            for scale, expected in zip(case["scales"].tolist(), case[f"out_{name}"], strict=True):
                layer.set_scale("default", scale)
                torch.testing.assert_close(network(case["x"]), expected, rtol=1e-5, atol=1e-5)
                by_hand = F.linear(case["x"], W) + scale * factor * case["x"] @ A.T @ B.T
                torch.testing.assert_close(by_hand, expected, rtol=1e-5, atol=1e-5)
