"""Losses, labels, schedule and estimates of the step-aware preference model, beside the published programs' numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.functional.noise import add_noise, guide, per_sample, repeat_pair, to_epsilon, to_x0
from lightning_modules.functional.steps import draw_step, reverse_step
from lightning_modules.spo import select_pair
from lightning_modules.step_preference_model import (
    LogarithmicWarmup,
    StepPreferenceModel,
    in_batch_loss,
    logarithmic_warmup,
    pair_correct,
    pair_loss,
    pseudo_label,
    weighted_share,
)
from tests.rewards.test_step_preference import case, golden_network
from tests.rewards.tiny import TOY_CLIP

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def scores_of(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of given unit features."""
    scale, text = golden["log_logit_scale"].exp(), golden["text_features"]
    return tuple(scale * (text * golden[f"image_{k}_features"]).sum(1) for k in (0, 1))


def share(loss: Tensor, count: Tensor) -> Tensor:
    weight = 1 / count.float()
    return weighted_share(loss, weight, weight.sum())


# -------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("kind", ["pair", "in_batch"])
def test_golden_losses_and_gradients(kind):
    golden = case("pair_loss")
    inputs = {name: golden[name].requires_grad_() for name in ("image_0_features", "image_1_features")}
    inputs |= {name: golden[name].requires_grad_() for name in ("text_features", "log_logit_scale")}
    first, second = scores_of(golden)
    if kind == "pair":
        torch.testing.assert_close(first, golden["expected_scores_0"], **CLOSE)
        torch.testing.assert_close(second, golden["expected_scores_1"], **CLOSE)
        torch.testing.assert_close((first - second).sigmoid(), golden["expected_prob_0"], **CLOSE)
        loss = pair_loss(first, second, golden["label_0"])
        torch.testing.assert_close(loss, golden["expected_pair_loss_per_example"], **CLOSE)
    else:
        image = torch.cat([golden["image_0_features"], golden["image_1_features"]])
        loss = in_batch_loss(image, golden["text_features"], golden["log_logit_scale"].exp(), golden["label_0"])
    total = share(loss, golden["num_example_per_prompt"])
    torch.testing.assert_close(total, golden[f"expected_{kind}_loss"], **CLOSE)
    total.backward()
    for name, value in inputs.items():
        expected = golden[f"expected_{kind}_grad_{name.removesuffix('_features')}"]
        torch.testing.assert_close(value.grad, expected, atol=1e-4, rtol=1e-3)


def test_golden_loss_and_gradients_through_the_network():
    golden, network = case("criterion_end_to_end"), golden_network().requires_grad_(True)
    pixels = torch.cat([golden["pixel_values_0"], golden["pixel_values_1"]])
    image = network.encode_image(pixels, repeat_pair(golden["timesteps"]))
    scores = network.score(image, repeat_pair(network.encode_text(golden["input_ids"])))
    loss = share(pair_loss(*scores.chunk(2), golden["label_0"]), golden["num_example_per_prompt"])
    torch.testing.assert_close(loss, golden["expected_loss"], atol=1e-4, rtol=1e-4)
    loss.backward()
    gradients = {f"grad.model.{name}": p.grad for name, p in network.named_parameters()}
    for name in golden:
        if name.startswith("grad."):
            torch.testing.assert_close(gradients[name], golden[name], atol=2e-4, rtol=2e-3)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, golden["expected_total_grad_norm"], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("recipe", ["sd15", "sdxl"])
def test_golden_schedule(recipe):
    golden = case("lr_schedule")
    peak, warmup, total = golden[f"{recipe}_peak_warmup_total"].tolist()
    rates = [peak * logarithmic_warmup(n, int(warmup), int(total)) for n in golden[f"{recipe}_iteration"].tolist()]
    rates = torch.tensor(rates, dtype=torch.float64)
    torch.testing.assert_close(rates, golden[f"{recipe}_expected_lr"], rtol=1e-6, atol=0)


def test_golden_pseudo_labels():
    golden = case("pickscore_relabel")
    text = F.normalize(golden["text_embeds"], dim=1)
    scores = [
        golden["log_logit_scale"].exp() * (F.normalize(golden[f"image_{k}_embeds"], dim=1) * text).sum(1)
        for k in (0, 1)
    ]
    torch.testing.assert_close(scores[0], golden["scores_0"], **CLOSE)
    labels = pseudo_label(*scores, golden["threshold"].item())
    assert torch.equal(labels, golden["expected_label_0"])
    assert torch.equal(1 - labels, golden["expected_label_1"])


def test_golden_accuracy():
    golden = case("eval_accuracy")
    first, second = scores_of(golden)
    torch.testing.assert_close((second - first).sigmoid(), golden["expected_prob_1"], **CLOSE)
    correct = pair_correct(first, second, golden["label_0"])
    assert torch.equal(correct, golden["expected_is_correct_human"])
    decided = correct[golden["label_0"] != 0.5]
    assert torch.equal(decided, golden["expected_is_correct_pickscore"])
    torch.testing.assert_close(correct.mean(), golden["expected_accuracy_human"])
    torch.testing.assert_close(decided.mean(), golden["expected_accuracy_pickscore"])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_golden_noising_and_estimates_at_one_timestep_per_sample(kind):
    golden = case("batchable_ddim")
    abar, t = golden["alphas_cumprod"], golden["timesteps"]

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma; before the first timestep as at it."""
        return abar[t.clamp(min=0)].sqrt(), (1 - abar[t.clamp(min=0)]).sqrt()

    alpha, sigma = at(t)
    close = {"atol": 1e-4, "rtol": 1e-4}
    x_t = add_noise(golden["clean_latents"], golden["noise"], alpha, sigma)
    torch.testing.assert_close(x_t, golden["expected_noisy_fp32"], **close)
    x0 = to_x0("epsilon", golden["noise"], x_t, alpha, sigma)
    torch.testing.assert_close(x0, golden["expected_x0_from_true_noise"], **close)

    output = golden["model_output"]
    if kind == "sample":  # no network of ours predicts it: the estimate is given
        x0, eps = output, (x_t - per_sample(alpha, x_t) * output) / per_sample(sigma, x_t)
    else:
        x0, eps = to_x0(kind, output, x_t, alpha, sigma), to_epsilon(kind, output, x_t, alpha, sigma)
    torch.testing.assert_close(x0, golden[f"expected_x0_{kind}"], **close)
    mean, _ = reverse_step(x0, eps, (alpha, sigma), at(t - 1), eta=0.0)
    torch.testing.assert_close(mean, golden[f"expected_prev_{kind}_steps1000_eta0"], **close)
    if kind != "epsilon":
        return
    before = golden["prev_timesteps_stepsN"]
    assert torch.equal(before, t - 1000 // golden["num_inference_steps_N"])
    for eta in (0, 1):
        mean, std = reverse_step(x0, eps, (alpha, sigma), at(before), eta=float(eta))
        stepped = draw_step(mean, std, golden["variance_noise"])
        torch.testing.assert_close(stepped, golden[f"expected_prev_epsilon_stepsN_eta{eta}"], **close)
    torch.testing.assert_close(std.square(), golden["expected_variance_stepsN"], **close)


def test_golden_choice_of_best_and_worst():
    golden = case("win_lose_choice")
    best, worst, valid = select_pair(golden["scores"], golden["threshold"].item())
    assert torch.equal(torch.stack([best, worst]), golden["expected_indices"])
    assert torch.equal(valid, golden["expected_valid"])


class GivenOutputs(Backbone):
    """A diffusion model whose network's answers are those of a golden case; it keeps what it was asked."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.golden, self.lora, self.chunk_size = golden, None, 100
        self.asked: dict[str, Tensor] = {}
        abar = case("batchable_ddim")["alphas_cumprod"]
        self.alphas, self.sigmas = abar.sqrt(), (1 - abar).sqrt()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t], self.sigmas[t]

    def condition(self, batch: dict, prompts: list[str]) -> Conditioning:
        rows = 2 * len(self.golden["timesteps"])
        prefix = "negative_" if prompts == [""] else ""
        names = ["prompt_embeds"] + (["pooled_prompt_embeds"] if "pooled_prompt_embeds" in self.golden else [])
        condition = Conditioning({name: self.golden[prefix + name] for name in names})
        condition = Conditioning.cat([condition] * (rows // len(condition["prompt_embeds"])))
        if len(names) > 1:
            ids = torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]).expand(rows, 6)
            condition = Conditioning({**condition, "time_ids": ids})
        return condition

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        self.asked = {"sample": x_t, "timesteps": t, **condition}
        return torch.cat([self.golden[f"eps_{kind}_{k}"] for kind in ("uncond", "text") for k in (0, 1)])

    def decode_latents(self, latents: Tensor) -> Tensor:
        self.asked["decoded"] = latents / self.golden["scaling_factor"]
        return torch.zeros(len(latents), 3, 8, 8)

    encode_prompts = sample_timesteps = None


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_golden_estimates(family):
    golden = case(f"x0_estimate_{family}")
    B = len(golden["timesteps"])
    backbone = GivenOutputs(golden)
    module = StepPreferenceModel(backbone, str(TOY_CLIP), str(TOY_CLIP), guidance_scale=golden["guidance_scale"].item())
    module.use(nn.Identity(), None, 4, (0.5,) * 3, (0.5,) * 3)
    latents = torch.cat([golden["vae_latents_0"], golden["vae_latents_1"]]) * golden["scaling_factor"]
    batch = {"prompts": ["a"] * B}
    assert module.noised_pixels(batch, latents, golden["noise"], golden["timesteps"]).shape == (2 * B, 3, 4, 4)

    def of_image(name: str, k: int) -> Tensor:
        """Rows of image k: its negatives, then its prompts."""
        return torch.cat([half.chunk(2)[k] for half in backbone.asked[name].chunk(2)])

    close = {"rtol": 1e-4, "atol": 1e-3}
    for k in (0, 1):
        torch.testing.assert_close(of_image("sample", k), golden[f"expected_unet_sample_{k}"], **close)
        assert torch.equal(of_image("timesteps", k), golden["expected_unet_timesteps"])
        assert torch.equal(of_image("prompt_embeds", k), golden["expected_unet_text"])
        if family == "sdxl":
            assert torch.equal(of_image("pooled_prompt_embeds", k), golden["expected_unet_pooled"])
            assert torch.equal(of_image("time_ids", k), golden["expected_unet_time_ids"])
        expected = golden[f"expected_vae_decode_input_{k}"]
        torch.testing.assert_close(backbone.asked["decoded"].chunk(2)[k], expected, **close)


# -------------------------------------------------------------------------------------------------------- known values


def test_pair_loss_by_hand():
    first, second = torch.tensor([1.0, 1.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 3.0])
    loss = pair_loss(first, second, torch.tensor([1.0, 0.0, 1.0, 0.5]))
    expected = [math.log(1 + math.exp(-1)), math.log(1 + math.e), math.log(2), 0.0]
    assert loss.tolist() == pytest.approx(expected, abs=1e-7)


def test_a_soft_label_costs_nothing_at_its_own_probability():
    label = torch.tensor([0.7], dtype=torch.float64)
    margin = torch.logit(label)
    assert pair_loss(margin, torch.zeros_like(margin), label).item() == pytest.approx(0.0, abs=1e-12)
    assert pair_loss(margin + 0.1, torch.zeros_like(margin), label).item() > 1e-4


def test_exchanging_images_and_labels_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(10, 6, generator=generator, dtype=torch.float64), dim=1)
    text = F.normalize(torch.randn(5, 6, generator=generator, dtype=torch.float64), dim=1)
    label = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.3], dtype=torch.float64)
    first, second = (8 * (image * repeat_pair(text)).sum(1)).chunk(2)
    torch.testing.assert_close(pair_loss(first, second, label), pair_loss(second, first, 1 - label))
    exchanged = torch.cat(image.chunk(2)[::-1])
    scale = torch.tensor(8.0, dtype=torch.float64)
    torch.testing.assert_close(
        in_batch_loss(image, text, scale, label), in_batch_loss(exchanged, text, scale, 1 - label)
    )
    assert torch.equal(pseudo_label(first, second, 0.1), 1 - pseudo_label(second, first, 0.1))
    torch.testing.assert_close(pair_correct(first, second, label), pair_correct(second, first, 1 - label))


def test_a_tie_of_equal_scores_has_no_gradient():
    scores = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = pair_loss(scores, scores.detach().clone(), torch.tensor([0.5, 0.5]))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert scores.grad.tolist() == [0.0, 0.0]


def test_a_tie_draws_scores_together_and_a_decision_apart():
    first = torch.tensor([2.0, 2.0], requires_grad=True)
    pair_loss(first, torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.0])).sum().backward()
    assert first.grad[0] > 0 > first.grad[1]


def test_in_batch_loss_of_one_pair_has_no_image_part():
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0]])
    loss = in_batch_loss(image, text, torch.tensor(1.0), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) / 2)


def test_shares_of_ranks_of_any_size_average_to_the_whole():
    loss, weight = torch.rand(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    whole = weighted_share(loss, weight, weight.sum())
    torch.testing.assert_close(whole, (loss * weight).sum() / weight.sum())
    parts = [weighted_share(loss[r], weight[r], weight.sum(), 3) for r in (slice(0, 1), slice(1, 5), slice(5, 7))]
    torch.testing.assert_close(sum(parts) / 3, whole)


@pytest.mark.parametrize(("gap", "label"), [(0.2008, 1.0), (0.2006, 0.5), (0.0, 0.5), (-0.2006, 0.5), (-0.2008, 0.0)])
def test_a_threshold_of_a_tenth_is_a_gap_of_0_2007(gap, label):
    assert pseudo_label(torch.tensor([20.0 + gap]), torch.tensor([20.0]), 0.1).item() == label


def test_equal_scores_count_as_the_caller_says():
    equal, label = torch.ones(3), torch.tensor([1.0, 0.0, 0.5])
    assert pair_correct(equal, equal, label).tolist() == [0.0, 0.0, 0.0]
    assert pair_correct(equal, equal, label, tie=0.5).tolist() == [0.5, 0.5, 0.5]


def test_guidance_by_hand():
    assert guide(torch.tensor([1.0]), torch.tensor([2.0]), 5.0).item() == 6.0
    assert guide(torch.tensor([1.0]), torch.tensor([2.0]), 1.0).item() == 2.0
    half = guide(torch.tensor([1.0]).half(), torch.tensor([2.0]).half(), 5.0)
    assert half.dtype == torch.float32


def test_schedule_rises_fast_and_ends_at_nothing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = LogarithmicWarmup(optimizer, warmup_steps=4, total_steps=8)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    up = [2 * math.log(n + 1) / math.log(4) for n in range(4)]
    assert rates == pytest.approx([*up, 2.0, 1.5, 1.0, 0.5, 0.0])
    assert logarithmic_warmup(0, 0, 10) == 1.0
    assert logarithmic_warmup(0, 1, 10) == 1.0
    with pytest.raises(ValueError, match="expected a warm-up shorter than the run"):
        LogarithmicWarmup(optimizer, warmup_steps=8, total_steps=8)
