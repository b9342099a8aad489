"""The Diffusion-DPO loss: values known by hand, the published programs' numbers, and the direction of its gradient."""

import math

import pytest
import torch

from lightning_modules.diffusion_dpo import diffusion_dpo_loss, dpo_margin, implicit_accuracy, preference_loss
from lightning_modules.functional.noise import per_sample_mse
from tests.golden_cases import assert_golden, case_names, load_case


def test_loss_is_log_two_when_policy_equals_reference():
    loss, margin = diffusion_dpo_loss(torch.tensor([0.3, 0.7]), torch.tensor([0.3, 0.7]), beta=2000.0)
    assert loss.item() == pytest.approx(math.log(2.0), abs=1e-7)
    assert margin.item() == 0.0


def test_loss_of_a_known_margin():
    # margin (0.5 - 0.3) - (0.5 - 0.6) = 0.3; beta / 2 * 0.3 = 1.5; log(1 + exp(-1.5)) = 0.2014133
    loss, margin = diffusion_dpo_loss(
        torch.tensor([0.3, 0.6], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64), beta=10.0
    )
    assert margin.item() == pytest.approx(0.3)
    assert loss.item() == pytest.approx(0.20141327798275246)


def test_gradient_lowers_the_preferred_error_and_raises_the_other():
    error = torch.tensor([0.3, 0.7], requires_grad=True)
    diffusion_dpo_loss(error, torch.tensor([0.3, 0.7]), beta=1.0)[0].sum().backward()
    preferred, rejected = error.grad
    assert preferred > 0 > rejected


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_every_loss_falls_as_the_margin_grows_from_zero(loss_type):
    margin = torch.zeros(1, requires_grad=True)
    preference_loss(margin, beta=4.0, loss_type=loss_type).sum().backward()
    assert margin.grad.item() < 0


def test_hinge_and_ipo_of_a_known_margin():
    margin = torch.tensor([0.1, 2.0])
    # b = beta / 2 = 2: hinge max(0, 1 - 0.2) and max(0, 1 - 4); ipo (0.1 - 0.25)^2 and (2 - 0.25)^2
    torch.testing.assert_close(preference_loss(margin, 4.0, "hinge"), torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(preference_loss(margin, 4.0, "ipo"), torch.tensor([0.0225, 3.0625]))


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="sigmoid, hinge and ipo"):
        preference_loss(torch.zeros(1), 1.0, "cpo")


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_an_even_label_pulls_the_margin_to_zero_from_both_sides(loss_type):
    for start, sign in ((0.2, 1), (-0.2, -1)):
        error = torch.tensor([-start, 0.0], requires_grad=True)
        loss, margin = diffusion_dpo_loss(error, torch.zeros(2), 20.0, loss_type, label=torch.tensor([0.5]))
        loss.sum().backward()
        assert margin.item() == pytest.approx(start)
        # Descending the preferred image's error raises the margin, so the gradient's sign opposes the margin's.
        assert error.grad[0].item() * sign < 0


def test_label_one_is_the_plain_loss():
    error, reference = torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0.4, 0.3, 0.2, 0.2])
    with_label, _ = diffusion_dpo_loss(error, reference, 50.0, label=torch.ones(2))
    assert torch.equal(with_label, diffusion_dpo_loss(error, reference, 50.0)[0])


def test_swapping_the_images_negates_the_margin():
    error, reference = torch.rand(6), torch.rand(6)
    swapped = diffusion_dpo_loss(error.roll(3), reference.roll(3), 1.0)[1]
    assert torch.equal(swapped, -diffusion_dpo_loss(error, reference, 1.0)[1])


def test_ties_count_as_asked():
    margin = torch.tensor([0.2, -0.1, 0.0, 0.0])
    assert implicit_accuracy(margin).item() == 0.25
    assert implicit_accuracy(margin, tie=0.5).item() == 0.5


@pytest.mark.parametrize("case", case_names("diffusion_dpo", "dpo_loss_"))
def test_golden_loss(case):
    tensors, params = load_case("diffusion_dpo", case)
    lora_sd = "lora_sd_" in case  # that script's beta has no factor 1/2
    beta = params["beta_dpo"] * (2 if lora_sd else 1)
    prediction = tensors["model_pred"].clone().requires_grad_()
    error = per_sample_mse(prediction, tensors["target"])
    reference_error = per_sample_mse(tensors["ref_pred"], tensors["target"])
    loss, margin = diffusion_dpo_loss(error, reference_error, beta, params.get("loss_type", "sigmoid"))
    loss.mean().backward()
    assert_golden(
        "diffusion_dpo",
        case,
        loss=loss.mean(),
        implicit_acc=implicit_accuracy(margin, tie=0.5 if "lora" in case else 0.0),
        grad_model_pred=prediction.grad,
        **({"logits": margin} if lora_sd else {"inside_term": 0.5 * beta * margin}),
    )
    if "lora" not in case:
        e_w, e_l = error.chunk(2)
        r_w, r_l = reference_error.chunk(2)
        assert_golden(
            "diffusion_dpo",
            case,
            model_losses=error,
            ref_losses=reference_error,
            model_diff=e_w - e_l,
            ref_diff=r_w - r_l,
            raw_model_loss=0.5 * (e_w.mean() + e_l.mean()),
            raw_ref_loss=reference_error.mean(),
        )
        double = {name: tensors[name].double() for name in ("model_pred", "ref_pred", "target")}
        errors = [per_sample_mse(double[name], double["target"]) for name in ("model_pred", "ref_pred")]
        loss, margin = diffusion_dpo_loss(*errors, beta)
        assert margin.dtype == torch.float64
        assert_golden("diffusion_dpo", case, inside_term_f64=0.5 * beta * margin, loss_f64=loss.mean())


@pytest.mark.parametrize("case", case_names("diffusion_dpo", "trace_"))
def test_golden_trace_of_the_published_script(case):
    tensors, params = load_case("diffusion_dpo", case)
    error = per_sample_mse(tensors["model_pred"], tensors["target"])
    reference_error = per_sample_mse(tensors["ref_pred"], tensors["target"])
    loss, margin = diffusion_dpo_loss(error, reference_error, params["beta_dpo"])
    assert_golden(
        "diffusion_dpo",
        case,
        model_losses=error,
        ref_losses=reference_error,
        inside_term=0.5 * params["beta_dpo"] * margin,
        loss=loss.mean(),
        raw_ref_loss=reference_error.mean(),
    )


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_equal_half_precision_predictions_give_a_zero_margin(name, dtype):
    tensors, params = load_case("diffusion_dpo", "half_precision_reference_quirk")
    prediction, target = tensors["ref_pred"].to(dtype), tensors["target"].to(dtype)
    errors = per_sample_mse(prediction.float(), target), per_sample_mse(prediction, target)
    loss, margin = diffusion_dpo_loss(*errors, params["beta_dpo"])
    assert_golden(
        "diffusion_dpo",
        "half_precision_reference_quirk",
        **{f"right_inside_{name}": 0.5 * params["beta_dpo"] * margin, f"right_loss_{name}": loss.mean()},
    )


def test_margin_is_the_gain_on_the_preferred_image_minus_the_gain_on_the_other():
    assert dpo_margin(torch.tensor([1.0, 5.0]), torch.tensor([4.0, 6.0])).item() == 2.0
