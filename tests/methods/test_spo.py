"""SPO on tiny pipelines: what the rollout asks of network and judge, what is trained, logged, kept and resumed."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from datamodules.prompt_stream import PromptStream
from datamodules.prompts import PromptList
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.base import batch_seed
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.combine import WeightedSum
from lightning_modules.spo import SPO
from tests.methods.spo_runs import Dice, Plain, Spy, Stripes, build, fit, rows, weights, write_prompts
from tests.pairs import RandomPairs


def loaded(pretrained, judge: Reward | None = None, moved: bool = True, **settings) -> SPO:
    """A module outside a Trainer, its trained weights moved away from the reference's."""
    module = build(pretrained, judge, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module.backbone.load(keep_reference=True)
        if moved:
            for parameter in module.trained_parameters().values():
                parameter.data += 0.05 * torch.randn_like(parameter)
    module.prepare_steps()
    return module


class Asked:
    """Records what a backbone's network is asked."""

    def __init__(self, backbone) -> None:
        self.rows, self.calls, network = 0, [], backbone.predict

        def predict(x, t, condition):
            self.rows += len(x)
            self.calls.append((len(x), t.tolist(), condition))
            return network(x, t, condition)

        backbone.predict = predict


# ------------------------------------------------------------------------------------------------------------- rollout


def test_rollout_runs_the_networks_as_often_as_it_must(sd15):
    """Published setting at 20 steps: 1300 / 640 / 640 rows for 10 prompts, so 130 / 64 / 64 for each."""
    judge = Stripes()
    module = loaded(sd15, judge, num_steps=20, first_step=4, candidates=4)
    asked, decoded = Asked(module.backbone), []
    decode = module.backbone.decode_latents
    module.backbone.decode_latents = lambda latents: decoded.append(len(latents)) or decode(latents)
    with torch.no_grad():
        pairs, scores = module.sample(["a ring", "a dog"])
    assert asked.rows == 2 * 130
    assert decoded == [8] * 16
    assert scores.shape == (16, 4, 2)
    assert [t for _, t in judge.calls] == [[float(t)] * 8 for t in [*range(701, 0, -50), 0]]
    assert judge.calls[0][0] == ["a ring", "a dog"] * 4
    assert [calls[1][0] for calls in asked.calls] == list(range(951, 0, -50))
    assert 0 < len(pairs["t"]) <= 32


def test_several_steps_of_a_candidate_are_judged_together(sdxl):
    """SDXL's published setting: 70 rows and 8 decoded images for each prompt, pairs of four steps."""
    judge = Stripes(strength=1e7)
    module = loaded(sdxl, judge, family=SDXL, num_steps=20, first_step=4, candidates=2, inner_steps=3)
    asked = Asked(module.backbone)
    with torch.no_grad():
        pairs, _ = module.sample(["a ring", "a dog"])
    assert asked.rows == 2 * 70
    assert [t[0] for _, t in judge.calls] == [551.0, 351.0, 151.0, 0.0]
    assert pairs["t"].tolist() == [t for t in range(751, 0, -50) for _ in range(2)]
    assert pairs["shared"].view(-1, 4, 2).tolist() == [[[True] * 2] + [[False] * 2] * 3] * 4


def test_every_prompt_is_encoded_once(sd15):
    module = loaded(sd15)
    encode, encoded = module.backbone.encode_prompts, []
    module.backbone.encode_prompts = lambda prompts: encoded.extend(prompts) or encode(prompts)
    module.prompts = ["a ring", "a dog"]
    with torch.no_grad():
        pairs, _ = module.sample(module.prompts)
    module.log_ratio(pairs)
    assert sorted(encoded) == ["", "a dog", "a ring"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_guidance_leads_away_from_what_the_family_has_without_a_negative_prompt(family, request):
    module = loaded(request.getfixturevalue(family), family={"sd15": SD15, "sdxl": SDXL}[family])
    asked = Asked(module.backbone)
    with torch.no_grad():
        module.sample(["a ring", "a dog"])
    assert {number for number, *_ in asked.calls} == {4, 12}  # two prompts, then three candidates of each, both twice
    condition = asked.calls[0][2]
    empty = module.backbone.encode_prompts([""])
    for name, tensor in condition.items():
        expected = torch.zeros_like(empty[name]) if family == "sdxl" else empty[name]
        assert all(torch.equal(row, expected[0]) for row in tensor[:2]), name
        assert not torch.equal(tensor[2], tensor[0])


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_without_guidance_the_network_sees_prompts_only(guidance_scale, sd15, tmp_path):
    module = loaded(sd15, guidance_scale=guidance_scale)
    asked = Asked(module.backbone)
    with torch.no_grad():
        module.sample(["a ring"])
    assert {number for number, *_ in asked.calls} == {1, 3}
    assert fit(build(sd15, guidance_scale=guidance_scale), tmp_path, max_epochs=1).global_step > 0


def test_a_reward_without_a_timestep_sees_images_in_range(sd15):
    judge = Plain()
    module = loaded(sd15, judge)
    decode = module.backbone.decode_latents
    module.backbone.decode_latents = lambda latents: 3 * decode(latents)  # overshoots
    with torch.no_grad():
        module.sample(["a ring"])
    assert min(low for low, _ in judge.seen) == 0
    assert max(high for _, high in judge.seen) == 1


def test_latents_and_pairs_are_float32_under_autocast(sd15):
    module = build(sd15)
    module.backbone.load(torch.bfloat16, keep_reference=True)
    module.prepare_steps()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pairs, _ = module.sample(["a ring"])
    assert pairs["x_t"].dtype == pairs["x_s"].dtype == torch.float32
    # Each latent lies where float32 arithmetic puts it, not on bfloat16's grid.
    assert not torch.equal(pairs["x_s"], pairs["x_s"].bfloat16().float())


# ---------------------------------------------------------------------------------------------------------------- loss


def sampled_pairs(module: SPO, prompts: list[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    module.prompts = prompts
    with torch.no_grad():
        return module.sample(prompts)[0]


def gradient_of(module: SPO, pairs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    asked = Asked(module.backbone)
    log_ratio = module.log_ratio(pairs)
    parameters = list(module.trained_parameters().values())
    # Not the clipped loss: most ratios of such large changes have no gradient in it.
    gradients = torch.autograd.grad((log_ratio * torch.linspace(1, 2, len(log_ratio))).sum(), parameters)
    return log_ratio.detach(), torch.cat([g.flatten() for g in gradients]), asked.rows


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_pairs_of_one_parent_share_their_forward_passes(inner_steps, lora, sd15):
    module = loaded(sd15, Stripes(strength=1e7), lora=lora, inner_steps=inner_steps)
    pairs = sampled_pairs(module, ["a ring", "a dog"])
    number, shared = len(pairs["t"]), int(pairs["shared"].sum())
    assert (number, shared) == (8, 8 if inner_steps == 0 else 4)
    log_ratio, gradient, evaluated = gradient_of(module, pairs)
    twice = gradient_of(module, pairs | {"shared": torch.zeros(number, dtype=torch.bool)})
    # Policy and reference, with and without prompt.
    assert (evaluated, twice[2]) == (4 * (2 * number - shared), 4 * 2 * number)
    torch.testing.assert_close(log_ratio, twice[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, twice[1], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert gradient.abs().max() > 0


def test_log_ratio_does_not_depend_on_the_rest_of_the_micro_batch(sd15):
    module = loaded(sd15, Stripes(strength=1e7), inner_steps=1)
    pairs = sampled_pairs(module, ["a ring", "a dog"])
    preferred, rejected = module.log_ratio(pairs).chunk(2)
    for i in (0, 3, 7):
        alone = module.log_ratio({name: tensor[i : i + 1] for name, tensor in pairs.items()})
        torch.testing.assert_close(alone, torch.stack([preferred[i], rejected[i]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_policy_equals_the_reference_exactly(dtype, lora, sd15):
    module = build(sd15, lora=lora)
    module.backbone.load(dtype, keep_reference=True)
    module.prepare_steps()
    pairs = sampled_pairs(module, ["a ring"])
    if dtype == torch.float32 or lora:
        assert module.log_ratio(pairs).tolist() == [0.0] * (2 * len(pairs["t"]))
    else:  # the same weights, cast once or at every call
        assert module.log_ratio(pairs).abs().max() < 1e-4


def test_guidance_can_be_left_out_of_the_loss(sd15):
    module = loaded(sd15, guided_loss=False)
    pairs = sampled_pairs(module, ["a ring"])
    asked = Asked(module.backbone)
    module.log_ratio(pairs)
    assert [number for number, *_ in asked.calls] == [len(pairs["t"])] * 2


# ------------------------------------------------------------------------------------------------------------ training


def test_a_round_is_sampled_once_and_trained_on_once(sd15, tmp_path):
    spy = Spy()
    module = build(sd15, Stripes(strength=1e7))
    trainer = fit(module, tmp_path, callbacks=[spy], max_epochs=2, prompts=7)
    # Two of 7 prompts a round, 3 rounds an epoch; 8 pairs in 3 micro-batches, of 3, 3 and 2.
    assert [visit for visit, *_ in spy.rows] == [0, 1, 2] * 6
    assert [left for *_, left in spy.rows] == [5, 2, 0] * 6
    assert len(module.judge.calls) == 6 * 4
    assert trainer.global_step == 18
    assert sorted(p.stem for p in (tmp_path / "checkpoints").iterdir()) == sorted(f"step={k}" for k in range(1, 19))


def test_prompts_come_in_a_new_order_in_every_pass(sd15, tmp_path):
    module = build(sd15)
    fit(module, tmp_path, max_epochs=3, prompts=4)
    seen = [prompts[:2] for prompts, _ in module.judge.calls[::4]]
    passes = [[*seen[k], *seen[k + 1]] for k in (0, 2, 4)]
    assert all(sorted(prompts) == [f"picture {i}" for i in range(4)] for prompts in passes)
    assert len({tuple(prompts) for prompts in passes}) > 1


def test_batches_without_pairs_make_no_optimizer_step(sd15, tmp_path):
    spy = Spy()
    module = build(sd15)
    trainer = fit(module, tmp_path, callbacks=[spy], max_epochs=4)
    steps = sum(after - before for _, before, after, _ in spy.rows)
    assert 0 < steps < len(spy.rows)
    assert trainer.global_step == steps
    valid = [float(row["rollout/valid_share"]) for row in rows(tmp_path) if "rollout/valid_share" in row]
    assert steps == sum(math.ceil(round(share * 8) / 3) for share in valid)
    losses = [row for row in rows(tmp_path) if "train/loss" in row]
    assert [int(row["step"]) for row in losses] == list(range(steps))


def test_max_steps_counts_optimizer_steps_and_stops_inside_a_round(sd15, tmp_path):
    trainer = fit(build(sd15, Stripes(strength=1e7)), tmp_path, max_steps=5, max_epochs=-1)
    assert trainer.global_step == 5


def test_first_loss_is_log_two_and_its_gradient_survives_autocast(sd15, tmp_path):
    """Weights that the rollout casts to bfloat16 without a gradient must not be taken again for the loss."""
    norms = {}
    for precision in ("32-true", "bf16-mixed"):
        for lora in (True, False):
            folder = tmp_path / f"{precision}{lora}"
            fit(build(sd15, Stripes(1e7), lora=lora, gradient_clip_val=None), folder, precision=precision, max_steps=1)
            first = next(row for row in rows(folder) if "train/loss" in row)
            assert float(first["train/loss"]) == pytest.approx(math.log(2), abs=1e-3)
            assert float(first["train/ratio_preferred"]) == pytest.approx(1, abs=1e-4)
            norms[precision, lora] = float(first["train/gradient_norm"])
    for lora in (True, False):
        assert norms["bf16-mixed", lora] == pytest.approx(norms["32-true", lora], rel=0.3)


def test_training_makes_preferred_steps_more_probable(sd15, tmp_path):
    """The same pairs over and over: the loss falls below log 2 and the pairs are told apart."""
    module = build(sd15, Stripes(strength=1e7), train_batch_size=8, lr=5e-3)
    fit(module, tmp_path, max_steps=1, max_epochs=-1)
    pairs = sampled_pairs(module, ["a ring", "a dog"])
    optimizer = torch.optim.AdamW(module.trained_parameters().values(), lr=5e-3)
    for _ in range(20):
        preferred, rejected = module.log_ratio(pairs).chunk(2)
        optimizer.zero_grad()
        (rejected - preferred).mean().backward()
        optimizer.step()
    preferred, rejected = module.log_ratio(pairs).detach().chunk(2)
    assert (preferred > rejected).all()


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_true_gradient_norm_is_logged_and_clipping_is_an_option(clip, sd15, tmp_path):
    module = build(sd15, Stripes(1e7), gradient_clip_val=clip, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit(module, tmp_path, max_steps=1, max_epochs=-1)
    norm = float(next(row for row in rows(tmp_path) if "train/loss" in row)["train/gradient_norm"])
    assert norm > 0.01
    start = build(sd15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch_seed(11, "initial weights", 0))
        start.backbone.load()
    before, after = (part.trained_parameters().values() for part in (start, module))
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert moved.norm().item() == pytest.approx(norm if clip is None else clip, rel=1e-3)


def test_unfinished_windows_go_on_in_the_next_round_unless_flushed(sd15, tmp_path):
    """8 pairs a round in micro-batches of 3, 3 and 2; windows of two."""
    for flush, expected in ((False, [0, 1, 0, 1, 0, 1]), (True, [0, 1, 1, 0, 1, 1])):
        spy = Spy()
        module = build(sd15, Stripes(strength=1e7), accumulate_grad_batches=2, flush=flush)
        fit(module, tmp_path / str(flush), callbacks=[spy], max_epochs=1, prompts=4)
        assert [after - before for _, before, after, _ in spy.rows] == expected


def test_accumulated_micro_batches_make_the_step_of_one_large_batch(sd15, tmp_path):
    for size, accumulate in ((8, 1), (2, 4)):
        module = build(
            sd15,
            Stripes(strength=1e7),
            train_batch_size=size,
            accumulate_grad_batches=accumulate,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        )
        fit(module, tmp_path / str(size), max_steps=2, max_epochs=-1)
    whole, parts = (weights(tmp_path / size / "checkpoints" / "step=2.ckpt") for size in "82")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)


def test_learning_rate_follows_optimizer_steps(sd15, tmp_path):
    module = build(sd15, warmup_steps=4, accumulate_grad_batches=2)
    fit(module, tmp_path, max_steps=6, max_epochs=-1, callbacks=[LearningRateMonitor("step")])
    rates = {int(row["step"]): float(row["lr-AdamW"]) for row in rows(tmp_path) if "lr-AdamW" in row}
    assert rates == pytest.approx({k: 1e-3 * min(1, (k + 1) / 4) for k in range(6)})
    assert all(float(row["lr-AdamW"]) == rates[int(row["step"])] for row in rows(tmp_path) if "lr-AdamW" in row)


def test_logs_tell_rollout_pairs_and_timesteps(sd15, tmp_path):
    fit(build(sd15, Stripes(1e7)), tmp_path, max_epochs=2)
    names = {name for row in rows(tmp_path) for name in row}
    pairs = ("loss", "margin", "pair_accuracy", "log_ratio_preferred", "log_ratio_rejected", "ratio_preferred")
    assert {f"train/{name}" for name in (*pairs, "ratio_rejected", "clip_share", "gradient_norm")} <= names
    assert {"rollout/score_mean", "rollout/score_std", "rollout/valid_share"} <= names
    for t in ("0333", "0167", "0499", "0001"):
        assert {f"timestep/{name}_{t}" for name in ("margin", "pair_accuracy", "clip_share")} <= names
    first = rows(tmp_path)[0]
    assert float(first["train/pair_accuracy"]) == 0.5
    by_round = [row for row in rows(tmp_path) if "timestep/clip_share_0001" in row]
    assert len(by_round) == 6


def test_a_random_judge_teaches_nothing_in_one_direction(sd15):
    """Scores that do not depend on the image: over many prompts the gradients of the pairs cancel."""
    module = loaded(sd15, Dice(), moved=False)
    torch.manual_seed(0)
    sums, sizes = [], []
    for _ in range(8):
        pairs = sampled_pairs_again(module)
        preferred, rejected = module.log_ratio(pairs).chunk(2)
        gradients = torch.autograd.grad((preferred - rejected).mean(), list(module.trained_parameters().values()))
        sums.append(torch.cat([g.flatten() for g in gradients]))
        sizes.append(sums[-1].norm())
    mean = torch.stack(sums).mean(0)
    assert mean.norm() < 0.5 * torch.stack(sizes).mean()


def sampled_pairs_again(module: SPO) -> dict[str, torch.Tensor]:
    module.prompts = ["a ring", "a dog"]
    with torch.no_grad():
        return module.sample(module.prompts)[0]


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": False, "inner_steps": 1},
        {"accumulate_grad_batches": 2, "warmup_steps": 3},
        {"accumulate_grad_batches": 2, "flush": True},
    ],
    ids=str,
)
def test_resume_repeats_the_run_bit_for_bit(settings, sd15, tmp_path):
    """From the first step, from one in the middle and from the last but one."""
    length = {"max_epochs": 2, "prompts": 4}
    last = fit(build(sd15, **settings), tmp_path / "whole", **length).global_step
    assert last >= 4
    expected = weights(tmp_path / "whole" / "checkpoints" / f"step={last}.ckpt")
    inside = 0
    for step in (1, last // 2, last - 1):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        inside += "pairs" in torch.load(checkpoint, weights_only=True)["limelight"]
        folder = tmp_path / f"from{step}"
        again = fit(build(sd15, **settings), folder, ckpt_path=checkpoint, **length)
        assert again.global_step == last
        actual = weights(folder / "checkpoints" / f"step={last}.ckpt")
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
        later = rows(folder)
        assert later == rows(tmp_path / "whole")[-len(later) :]
    assert inside > 0 or settings  # some checkpoints carry what was left of a round


def test_a_checkpoint_at_the_end_of_an_epoch_inside_a_window_resumes(sd15, tmp_path):
    """9 micro-batches an epoch (5 pairs in each of 3 rounds, 2 at a time) in windows of two leave one half done."""
    settings = {"accumulate_grad_batches": 2, "train_batch_size": 2, "first_step": 1}
    length = {"max_epochs": 2, "prompts": 3, "batch_size": 1}
    epochs = ModelCheckpoint(tmp_path / "epochs", save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}")
    whole = fit(build(sd15, Stripes(1e7), **settings), tmp_path / "whole", callbacks=[epochs], **length)
    end = f"step={whole.global_step}.ckpt"
    about = torch.load(tmp_path / "epochs" / "epoch=0.ckpt", weights_only=True)["limelight"]
    assert about["accumulated"] == 1
    assert about["gradients"]
    again = fit(
        build(sd15, Stripes(1e7), **settings), tmp_path / "again", tmp_path / "epochs" / "epoch=0.ckpt", **length
    )
    assert again.global_step == whole.global_step == 9
    expected, actual = (weights(tmp_path / name / "checkpoints" / end) for name in ("whole", "again"))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_another_step_count_does_not_change_the_pairs_that_are_left(sd15, tmp_path):
    """Pairs carry their timesteps, so that a resumed run may sample in other steps from then on."""
    fit(build(sd15, Stripes(1e7)), tmp_path / "whole", max_steps=1, max_epochs=-1)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step=1.ckpt"
    kept = torch.load(checkpoint, weights_only=True)["limelight"]["pairs"]
    assert set(kept["t"].tolist()) <= {499, 333, 167, 1}
    module = build(sd15, Stripes(1e7), num_steps=4, first_step=1)
    trainer = fit(module, tmp_path / "again", ckpt_path=checkpoint, max_steps=6, max_epochs=-1)
    assert trainer.global_step == 6
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "again") if "train/loss" in row]
    assert all(math.isfinite(loss) for loss in losses)


# ------------------------------------------------------------------------------------------------------ user's mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "model.eta is 0.0; expected above 0"),
        ({"eta": 1.5}, "model.eta is 1.5"),
        ({"first_step": 6}, "model.first_step is 6; expected 0 to 5"),
        ({"first_step": -1}, "model.first_step is -1"),
        ({"candidates": 1}, "model.candidates is 1; expected 2 or more"),
        ({"num_steps": 0, "first_step": 0}, "model.num_steps is 0"),
        ({"inner_steps": -1}, "model.inner_steps is -1"),
        ({"threshold": 1.0}, "model.threshold is 1.0"),
        ({"beta": -10.0}, "model.beta is -10.0"),
        ({"clip": 1.0}, "model.clip is 1.0"),
        ({"train_batch_size": 0}, "model.train_batch_size is 0"),
        ({"accumulate_grad_batches": 0}, "model.accumulate_grad_batches is 0"),
        ({"gradient_clip_val": 0.0}, "model.gradient_clip_val is 0.0; expected a positive number, or null"),
        ({"guidance_scale": -1.0}, "model.guidance_scale is -1.0"),
    ],
)
def test_impossible_options_are_refused(settings, message, sd15):
    with pytest.raises(ValueError, match=message):
        build(sd15, **settings)


def test_a_sum_that_forgets_the_timestep_is_refused(sd15):
    with pytest.raises(ValueError, match="WeightedSum, which would ask its Stripes without the timestep"):
        build(sd15, WeightedSum({"a": Stripes(), "b": Plain()}, {"a": 1.0, "b": 0.5}))
    build(sd15, WeightedSum({"b": Plain()}, {"b": 0.5}))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gradient_clip_val": 1.0}, "set model.gradient_clip_val instead"),
        ({"accumulate_grad_batches": 4}, "set model.accumulate_grad_batches instead"),
    ],
)
def test_trainer_options_that_the_method_has_itself_are_refused(trainer, message, sd15, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(build(sd15), tmp_path, **trainer)


def test_checkpoints_by_time_are_refused(sd15, tmp_path):
    from datetime import timedelta

    with pytest.raises(ValueError, match="use every_n_train_steps"):
        fit(build(sd15), tmp_path, callbacks=[ModelCheckpoint(train_time_interval=timedelta(hours=1))])


def test_data_of_another_kind_are_refused(sd15, tmp_path):
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ValueError, match="SPO makes its own images and needs prompts only"):
        trainer.fit(build(sd15), datamodule=RandomPairs())
    data = PromptStream(PromptList(str(write_prompts(tmp_path))))
    with pytest.raises(ValueError, match="DiffusionDPO trains on images"):
        trainer.fit(DiffusionDPO(SD15(str(sd15))), datamodule=data)


def test_models_for_few_steps_are_refused(sdxl_turbo, tmp_path):
    with pytest.raises(ValueError, match="cannot be trained with it"):
        fit(build(sdxl_turbo, family=SDXL, num_steps=4, first_step=0), tmp_path)


def test_scores_that_are_no_numbers_stop_the_run(sd15, tmp_path):
    with pytest.raises(ValueError, match=r"scored an image of prompt 'picture \d' at timestep 333 as (nan|inf)"):
        fit(build(sd15, Stripes(strength=math.nan)), tmp_path)

    class Wrong(Reward):
        def score(self, images, prompts):
            return images.mean((2, 3))

    with pytest.raises(ValueError, match=r"gave scores of shape \(6, 3\) for 6 images"):
        fit(build(sd15, Wrong()), tmp_path)


def test_rounds_without_pairs_train_nothing_and_are_told_of(sd15, tmp_path):
    module = build(sd15, Stripes(strength=0.0))
    with pytest.warns(UserWarning, match="3 rounds in a row gave no pairs to train on"):
        trainer = fit(module, tmp_path, max_epochs=2)
    assert trainer.global_step == 0
    assert {float(row["rollout/valid_share"]) for row in rows(tmp_path)} == {0.0}


# ---------------------------------------------------------------------------------------------------------------- flows


def test_steps_of_a_flow_end_where_candidates_would_be_alike(sd3):
    """SD 3 samples down to a noise level of 0.003, then to none: two of six steps make no pairs."""
    judge = Stripes(strength=1e7)
    module = loaded(sd3, judge, family=SD3, num_steps=6, first_step=1)
    asked, module.prompts = Asked(module.backbone), ["a ring"]
    with torch.no_grad():
        pairs, scores = module.sample(module.prompts)
    grid = module.backbone.time_grid(6)
    torch.testing.assert_close(module.grid, grid[:-2])
    assert grid[-2] < 10  # of 1000
    landings = grid[2:-2].tolist()
    assert [t[0] for _, t in judge.calls] == landings
    assert scores.shape == (len(landings), 3, 1)
    assert pairs["t"].tolist() == grid[1:-3].tolist()
    assert pairs["s"].tolist() == landings
    assert [calls[1][0] for calls in asked.calls] == grid[:-2].tolist()  # at the last one for the judge alone
    log_ratio = module.log_ratio(pairs)
    assert log_ratio.isfinite().all()
    assert log_ratio.abs().max() > 0


def test_a_flow_needs_steps_that_are_left(sd3):
    with pytest.raises(ValueError, match=r"model.first_step is 4; expected 0 to 3: of 6 steps 2 land"):
        loaded(sd3, family=SD3, num_steps=6, first_step=4)


@pytest.mark.parametrize("lora", [True, False])
def test_spo_trains_a_flow(lora, sd3, tmp_path):
    module = build(sd3, Stripes(strength=1e7), family=SD3, lora=lora, first_step=1)
    trainer = fit(module, tmp_path, max_steps=3, max_epochs=-1)
    assert trainer.global_step == 3
    first = next(row for row in rows(tmp_path) if "train/loss" in row)
    assert float(first["train/loss"]) == pytest.approx(math.log(2), abs=1e-4)
    assert float(first["train/gradient_norm"]) > 0
