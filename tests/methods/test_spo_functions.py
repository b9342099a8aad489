"""SPO's formulas against golden numbers and by hand: selection, rollout, loss, sharding, pixels for the judge."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from lightning_modules.functional.noise import guide
from lightning_modules.functional.scores import cosine_score
from lightning_modules.functional.steps import denoise, log_probability, reverse_step
from lightning_modules.rewards.step_preference import pixels_for_spm
from lightning_modules.spo import rollout, select_pair, share_of_rank, spo_loss
from tests.golden_cases import assert_within, case_names, load_case, manifest

ALPHAS_CUMPROD = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def coefficients(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ALPHAS_CUMPROD[t].sqrt(), (1 - ALPHAS_CUMPROD[t]).sqrt()


def tolerance_of(name: str):
    return manifest("spo")[name]["tolerance"]


# ----------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("name", case_names("spo", "compare"))
def test_selected_pairs_are_the_published_ones(name):
    case, params = load_case("spo", name)
    best, worst, valid = select_pair(case["scores"], params["threshold"])
    assert torch.equal(valid, case["valid"])
    tied = case["scores"].amax(0) == case["scores"].amin(0)
    assert torch.equal(torch.stack([best, worst])[:, ~tied], case["indices"][:, ~tied])


def test_a_tie_is_never_valid():
    assert select_pair(torch.ones(3, 2), threshold=0.0)[2].tolist() == [False, False]
    assert select_pair(torch.tensor([[1.0], [1.0 + 1e-6]]), threshold=0.0)[2].item()


# ------------------------------------------------------------------------------------------------------------- rollout


def replay(case: dict, params: dict):
    """The rollout of a golden case, and the latents that its network and judge were shown."""
    B, K = params["batch"], params["num_candidates"]
    number = params["num_steps"]
    timesteps = torch.arange(number).flip(0) * (1000 // number) + 1
    grid = torch.cat([timesteps, torch.zeros(1, dtype=torch.int64)])
    predictions = iter([*case["eps_before"], *case["eps_after"]])
    noises = iter([*case["noise_before"], *case["noise_after"]])
    scores, chosen = iter(case["scores"]), iter(case["chosen"])
    seen: dict[str, list] = {"latents": [], "scored": [], "t": []}

    def predict(x, t):
        seen["latents"].append(x)
        return denoise("epsilon", next(predictions), x, coefficients(t.expand(len(x))))

    def step(x_0, epsilon, t, s):
        now, then = (coefficients(time.expand(len(x_0))) for time in (t, s))
        return reverse_step(x_0, epsilon, now, then, params["eta"])

    def score(latents, t):
        seen["scored"].append(latents)
        seen["t"].append(t)
        return next(scores)

    def draw(n):
        noise = next(noises)
        assert len(noise) == n
        return noise

    pairs, _ = rollout(
        case["x_T"],
        grid,
        predict,
        step,
        score,
        draw,
        choose=lambda n: next(chosen),
        candidates=K,
        first_step=params["divert_start_step"],
        inner_steps=params["num_inner_step"] or 0,
        threshold=params["threshold"],
        extend_last=params["model"] == "sdxl",
    )
    assert next(predictions, None) is None
    assert next(noises, None) is None
    assert next(scores, None) is None
    assert next(chosen, None) is None
    assert all(len(latents) in (B, K * B) for latents in seen["latents"])
    return pairs, seen


@pytest.mark.parametrize("name", case_names("spo", "rollout"))
def test_rollout_replays_the_published_one(name):
    case, params = load_case("spo", name)
    pairs, seen = replay(case, params)
    floats = tolerance_of(name)["floats"]
    after = [latents for latents in seen["latents"] if len(latents) > params["batch"]]
    assert_within(floats, torch.stack(after), case["latents_after"])
    assert_within(floats, torch.stack(seen["scored"]), case["scored_latents"])
    assert torch.equal(torch.stack(seen["t"]), case["scored_t"])
    assert torch.equal(pairs["t"], case["pair_t"])
    assert torch.equal(pairs["prompt"], case["pair_prompt"])
    assert_within(floats, pairs["x_s"], case["pair_x_prev"])
    assert_within(floats, pairs["x_t"][:, : case["pair_x_t"].shape[1]], case["pair_x_t"])
    assert torch.equal(pairs["s"], (pairs["t"] - 1000 // params["num_steps"]).clamp(min=0))
    same = (pairs["x_t"][:, 0] == pairs["x_t"][:, 1]).flatten(1).all(1)
    assert torch.equal(pairs["shared"], same)


@pytest.mark.parametrize(
    ("num_steps", "first", "inner", "extend_last", "groups", "judged"),
    [
        (6, 2, 0, False, [[2], [3], [4], [5]], [3, 4, 5, 6]),  # Stable Diffusion 1.5
        (6, 0, 0, False, [[0], [1], [2], [3], [4], [5]], [1, 2, 3, 4, 5, 6]),
        (6, 5, 0, False, [[5]], [6]),
        (6, 2, 0, True, [[2], [3], [4, 5]], [3, 4, 6]),  # SDXL's rule without further steps
        (6, 5, 3, True, [[5]], [6]),
        (8, 0, 3, True, [[0, 1, 2, 3], [4, 5, 6, 7]], [4, 8]),
        (9, 0, 3, True, [[0, 1, 2, 3], [4, 5, 6, 7, 8]], [4, 9]),  # the last step extends
        (9, 0, 3, False, [[0, 1, 2, 3], [4, 5, 6, 7], [8]], [4, 8, 9]),
        (6, 3, 9, True, [[3, 4, 5]], [6]),
    ],
)
def test_groups_of_steps_and_where_they_are_judged(num_steps, first, inner, extend_last, groups, judged):
    """Time runs backwards: timestep N - i before step i; candidate 0 is always the better one."""
    grid, events = torch.arange(num_steps, -1, -1), []

    def score(latents, t):
        events.append(num_steps - int(t))
        return torch.tensor([[9.0], [0.0]])

    pairs, scores = rollout(
        torch.zeros(1, 1, 1, 1),
        grid,
        predict=lambda x, t: (x, x),
        step=lambda x_0, epsilon, t, s: (x_0, torch.ones(len(x_0))),
        score=score,
        draw=lambda n: torch.randn(n, 1, 1, 1),
        choose=lambda n: torch.zeros(n, dtype=torch.int64),
        candidates=2,
        first_step=first,
        inner_steps=inner,
        threshold=0.3,
        extend_last=extend_last,
    )
    assert events == judged
    assert len(scores) == len(judged)
    assert (num_steps - pairs["t"]).tolist() == [i for group in groups for i in group]
    assert pairs["shared"].tolist() == [k == 0 for group in groups for k in range(len(group))]
    # Candidate 0 goes on, so that each step starts where the better latent of the step before ended.
    assert torch.equal(pairs["x_t"][1:, 0], pairs["x_s"][:-1, 0])


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("name", case_names("spo", "loss"))
def test_loss_and_gradient_of_pairs(name):
    case, params = load_case("spo", name)
    tolerance = tolerance_of(name)
    t = case["t"]
    now, then = coefficients(t), coefficients((t - 1000 // params["num_steps"]).clamp(min=0))
    outputs = {side: case[f"policy_out_{side}"].clone().requires_grad_() for side in ("win", "lose")}

    def logp(output, side):
        if params["cfg"]:
            output = guide(*output.chunk(2), params["guidance_scale"])
        x_t = case["x_t_win" if params["shared_x_t"] else f"x_t_{side}"]
        mean, std = reverse_step(*denoise("epsilon", output, x_t, now), now, then, params["eta"])
        return log_probability(case[f"x_prev_{side}"], mean, std)

    policy = [logp(outputs[side], side) for side in ("win", "lose")]
    reference = [logp(case[f"ref_out_{side}"], side) for side in ("win", "lose")]
    log_ratio = torch.cat(policy) - torch.cat(reference)
    loss, margin = spo_loss(log_ratio, params["beta"], params["clip_eps"])
    loss.mean().backward()

    for side, ours, theirs in zip(("win", "lose"), policy, reference, strict=True):
        assert_within(tolerance["logp"], ours, case[f"logp_{side}"])
        assert_within(tolerance["logp"], theirs, case[f"logp_ref_{side}"])
        assert_within(tolerance["grad"], outputs[side].grad, case[f"grad_policy_out_{side}"])
    low, high = 1 - params["clip_eps"], 1 + params["clip_eps"]
    ratios = log_ratio.exp().clamp(low, high).chunk(2)
    assert_within(tolerance["ratio"], ratios[0], case["ratio_win_clipped"])
    assert_within(tolerance["ratio"], ratios[1], case["ratio_lose_clipped"])
    torch.testing.assert_close(margin.exp(), ratios[0] / ratios[1])
    assert_within(tolerance["loss"], loss.mean(), case["loss"][0])


def test_loss_is_log_two_when_policy_equals_reference():
    loss, margin = spo_loss(torch.zeros(4), beta=10.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert margin.tolist() == [0.0, 0.0]


def test_gradient_raises_the_preferred_and_lowers_the_rejected():
    log_ratio = torch.zeros(2, requires_grad=True)
    spo_loss(log_ratio, beta=10.0)[0].sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([-5.0, 5.0])


@pytest.mark.parametrize("pessimistic", [False, True])
def test_ratios_outside_the_range_have_no_gradient_unless_on_the_wrong_side(pessimistic):
    """Preferred too probable, preferred too improbable; rejected likewise."""
    log_ratio = torch.tensor([0.2, -0.2, 0.0, 0.0, 0.0, 0.0, 0.2, -0.2], requires_grad=True)
    loss, _ = spo_loss(log_ratio, beta=10.0, clip=0.1, pessimistic=pessimistic)
    loss.sum().backward()
    still = [g != 0 for g in log_ratio.grad.tolist()]
    assert still == [False, pessimistic, True, True, True, True, pessimistic, False]


def test_loss_lies_between_its_published_bounds_and_stays_finite():
    log_ratio = torch.tensor([200.0, -200.0, -200.0, 200.0], requires_grad=True)
    loss, _ = spo_loss(log_ratio, beta=10.0, clip=0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.126, 2.133], abs=5e-4)
    assert log_ratio.grad.tolist() == [0, 0, 0, 0]


# -------------------------------------------------------------------------------------------------------------- sharing


@pytest.mark.parametrize("name", case_names("spo", "sharding"))
def test_pairs_are_dealt_out_as_published(name):
    case, params = load_case("spo", name)
    world, size = params["world_size"], params["train_batch_size"]
    shares = [share_of_rank(case["perm"], rank, world) for rank in range(world)]
    assert torch.equal(torch.stack(shares), case["rank_items"])
    for share in shares:
        assert [len(part) for part in share.split(size)] == case["minibatch_sizes"].tolist()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_fewer_pairs_than_ranks_train_nobody(number):
    assert [len(share_of_rank(torch.arange(number), rank, 4)) for rank in range(4)] == [0, 0, 0, 0]


# -------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", case_names("spo", "score"))
def test_pixels_and_score_of_a_decoded_image(name):
    case, params = load_case("spo", name)
    tolerance = tolerance_of(name)
    pixels = pixels_for_spm(case["image"], "scoring", params["image_size"], params["mean"], params["std"])
    assert_within(tolerance["pixel_values"], pixels, case["pixel_values"])
    score = case["logit_scale"].exp() * cosine_score(case["image_embed"], case["text_embed"])
    assert_within(tolerance["score"], score, case["score"])


def test_images_in_the_unit_interval_give_the_same_pixels():
    """Rewards take images in [0, 1], overshoot and all; the published code resizes in [-1, 1]."""
    image = 1.2 * torch.rand(1, 3, 40, 40) * 2 - 1.2
    shown = image / 2 + 0.5
    torch.testing.assert_close(pixels_for_spm(2 * shown - 1, "scoring", 24), pixels_for_spm(image, "scoring", 24))
