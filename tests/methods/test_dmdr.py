"""DMDR on tiny pipelines: who is trained when and by what, what is logged, kept and resumed, and what is refused."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import lightning_modules.dmdr as room
from lightning_modules.backbones.base import GENERATOR, SCORE
from lightning_modules.dmdr import DMDR
from lightning_modules.rewards.base import Reward
from tests.methods.dmdr_runs import Brightness, backbone_of, build, fit, loaded, weights

FAMILY_NAMES = ["sd15", "sdxl", "sd3"]


class Spy(pl.Callback):
    """What every inner step changed, and the state of the counters after it."""

    def __init__(self) -> None:
        self.rows: list[tuple[bool, bool, int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = [[p.detach().clone() for p in part] for part in pl_module.network_parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        moved = [
            any(not torch.equal(old, new) for old, new in zip(before, part, strict=True))
            for before, part in zip(self.before, pl_module.network_parameters(), strict=True)
        ]
        self.rows.append((*moved, trainer.global_step, pl_module.inner_step))


class SaveAt(pl.Callback):
    """Saves a checkpoint after one inner step."""

    def __init__(self, inner_step: int, file: Path) -> None:
        self.inner_step, self.file = inner_step, file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.inner_step == self.inner_step:
            trainer.save_checkpoint(self.file)


class Asked:
    """Records in which role, at which timesteps and on how many rows the network is asked."""

    def __init__(self, backbone) -> None:
        self.calls, network = [], backbone.predict

        def predict(x, t, condition):
            self.calls.append((backbone.acting, t.tolist(), torch.is_grad_enabled()))
            return network(x, t, condition)

        backbone.predict = predict

    @property
    def roles(self) -> list[tuple]:
        return [(role, len(t), grad) for role, t, grad in self.calls]


def one_step(module: DMDR, turn: bool, prompts=("a ring", "a dog")) -> dict[str, list[torch.Tensor]]:
    """An inner step outside a Trainer, without optimizer steps: the gradients of both networks, and what was logged."""
    module.inner_step = module.ratio if turn else 1
    module.manual_backward = lambda loss: loss.backward()
    steps = []

    class Optimizer:
        def __init__(self, which: int) -> None:
            self.which = which

        def step(self) -> None:
            steps.append(self.which)
            module.norm = torch.zeros(())

        def zero_grad(self) -> None:
            pass

    module.optimizers = lambda: [Optimizer(0), Optimizer(1)]
    if "seed_part" not in vars(module):
        module.seed_part = lambda stage, number, parts: torch.manual_seed(number + (100 if stage == "student" else 0))
    module.log = lambda *args, **kwargs: None
    module.training_step({"prompts": list(prompts), "visit": 0}, 0)
    return {"steps": steps, "gradients": [[p.grad for p in part] for part in module.network_parameters()]}


# -------------------------------------------------------------------------------------------------- who is trained when


@pytest.mark.parametrize("adapters", [True, False])
def test_the_fake_score_learns_at_every_inner_step_and_the_student_at_every_third(adapters, sd15, tmp_path):
    spy, module = Spy(), build(sd15, adapters=adapters)
    runner = fit(module, tmp_path, max_steps=2, callbacks=[spy])
    assert spy.rows == [
        *((False, True, 0, i) for i in (1, 2, 3)),
        (True, True, 1, 4),
        (False, True, 1, 5),
        (False, True, 1, 6),
        (True, True, 2, 7),
    ]
    assert runner.global_step == module.generator_step == 2


@pytest.mark.parametrize("adapters", [True, False])
def test_frozen_weights_stay(adapters, sd15, tmp_path):
    module = build(sd15, adapters=adapters)
    before = {}

    class Remember(pl.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if not p.requires_grad})

    fit(module, tmp_path, max_steps=1, callbacks=[Remember()])
    after = dict(module.named_parameters())
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_roles_in_an_update_are_asked_as_often_as_they_must(sd15):
    """The table of passes of the method: simulation 2, fake 1, student 1, fake 1 and teacher 2 rows."""
    module = loaded(build(sd15, shared_step=False, teacher_scale=0.5, dynamic_steps=4))
    module.generator_step, asked = 2, Asked(module.backbone)
    torch.manual_seed(0)
    one_step(module, turn=True)
    student, fake, teacher = (GENERATOR, 1.0), (SCORE, 2.0), (SCORE, pytest.approx(0.25))
    simulated = [call for call in asked.roles if call == (student, 2, False)]
    rest = asked.roles[len(simulated) :]
    assert rest == [(fake, 2, True), (student, 2, True), (fake, 2, False), (teacher, 4, False)]
    assert 1 <= len(simulated) <= 2
    module.generator_step, asked.calls[:] = 4, []  # after the dynamic phase the adapter is off
    one_step(module, turn=True)
    assert asked.roles[-1] == ((SCORE, 0.0), 4, False)


def test_without_guidance_the_teacher_is_asked_once(sd15):
    module = loaded(build(sd15, guidance_scale=1.0, guidance_jitter=0.0))
    asked = Asked(module.backbone)
    one_step(module, turn=True)
    assert asked.roles[-1][1] == 2
    assert module.negative is None


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("simulation", ["published", "dmd2"])
def test_gradients_land_only_where_they_should(simulation, adapters, sd15):
    module = loaded(
        build(sd15, adapters=adapters, simulation=simulation, rewards={"b": Brightness()}, reward_weights={"b": 1.0})
    )
    student, fake = one_step(module, turn=False)["gradients"]
    assert all(g is None for g in student)
    assert any(g is not None and g.abs().max() > 0 for g in fake)
    expected = [None if g is None else g.clone() for g in fake]
    for parameter in module.parameters():
        parameter.grad = None
    result = one_step(module, turn=True)
    assert result["steps"] == ([1, 0] if simulation == "published" else [0, 1])
    student, fake = result["gradients"]
    assert any(g is not None and g.abs().max() > 0 for g in student)
    if simulation == "published":  # the student's turn adds nothing to the fake score
        for before, after in zip(expected, fake, strict=True):
            torch.testing.assert_close(after, before)
    assert not any(p.grad is not None for p in module.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("family", "adapters", "simulation"),
    [("sd15", True, "published"), ("sd15", True, "dmd2"), ("sd15", False, "published"), ("sd3", True, "published")],
)
def test_checkpointing_changes_no_gradient_of_a_step(family, adapters, simulation, request):
    gradients = []
    for checkpointing in (False, True):
        options = {"simulation": simulation, "backbone": {"gradient_checkpointing": checkpointing}}
        module = loaded(build(request.getfixturevalue(family), family, adapters, dynamic_steps=9, **options))
        gradients.append(one_step(module, turn=True)["gradients"])
    for plain, again in zip(*gradients, strict=True):
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_micro_batches_make_the_update_of_the_whole_batch(sd15, monkeypatch):
    """With the same draws for each prompt, parts of a batch count the same as the batch at once."""
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first = {"row": 0}
    monkeypatch.setattr(room, "draw_noise", lambda like: noise[first["row"] : first["row"] + len(like)])
    monkeypatch.setattr(room, "draw_renoise_times", lambda n, *law: torch.full((n,), 0.4))
    monkeypatch.setattr(room, "draw_guidance", lambda scale, jitter: scale)
    prompts, results = ("a ring", "a dog", "a cat", "two rings"), []
    for size in (4, 2, 1):
        module = loaded(build(sd15, micro_batch_size=size, num_steps=1))
        module.seed_part = lambda stage, number, parts, size=size: first.update(row=number * size)
        results.append(one_step(module, turn=True, prompts=prompts)["gradients"])
    for parts in results[1:]:
        for whole, split in zip(sum(results[0], []), sum(parts, []), strict=True):
            torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize(("sampler", "shared"), [("sde", True), ("sde", False), ("ode", False)])
@pytest.mark.parametrize("simulation", ["published", "dmd2"])
def test_the_simulation_stops_where_it_may(simulation, sampler, shared, sd3):
    """With SDE steps the published form asks the network k times to train at step k, DMD2's form k - 1 times."""
    module = loaded(build(sd3, "sd3", num_steps=4, sampler=sampler, shared_step=shared, simulation=simulation))
    condition, asked = module.backbone.encode_prompts(["a ring", "a dog"]), Asked(module.backbone)
    grid = module.backbone.few_step_timesteps
    for seed in range(12):
        torch.manual_seed(seed)
        asked.calls.clear()
        sample = module.simulate(condition, 2)
        steps = [int((grid == t).nonzero()) for t in sample["t"]]
        assert len(set(steps)) == 1 or not shared
        expected = max(steps) + (simulation == "published")
        assert len(asked.calls) == (4 if sampler == "ode" and simulation == "published" else expected)
        assert [t[0] for _, t, _ in asked.calls] == grid.tolist()[: len(asked.calls)]
        assert ("x0" in sample) == (simulation == "published")
        assert not sample["x_in"].requires_grad


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_published_form_noises_the_sample_of_the_drawn_step(family, request):
    """At the first step the input is pure noise; at a later one alpha times the sample, and noise of its level."""
    module = loaded(build(request.getfixturevalue(family), family, num_steps=2, shared_step=True))
    condition = module.backbone.encode_prompts(["a ring"] * 8)
    seen = set()
    for seed in range(6):
        torch.manual_seed(seed)
        sample = module.simulate(condition, 8)
        alpha, sigma = (c[0] for c in module.backbone.coefficients(sample["t"]))
        if sample["t"][0] == module.backbone.few_step_timesteps[0]:
            noise, first = sample["x_in"], True
        else:
            noise, first = (sample["x_in"] - alpha * sample["x0"]) / sigma, False
        seen.add(first)
        assert noise.mean().abs() < 0.15
        assert noise.std() == pytest.approx(1.0, abs=0.1)
    assert seen == {True, False}


def test_in_dmd2s_form_the_student_is_given_what_it_meets_when_it_samples(sd15):
    module = loaded(build(sd15, num_steps=3, shared_step=False, simulation="dmd2"))
    condition = module.backbone.encode_prompts(["a ring", "a dog"])
    torch.manual_seed(4)
    sample = module.simulate(condition, 2)
    torch.manual_seed(4)
    steps = torch.randint(3, (2,), device="cpu")
    shape = (2, *module.backbone.latent_shape)
    with torch.no_grad():
        inputs, _ = module.backbone.sample_in_few_steps(torch.randn(shape), condition, lambda: torch.randn(shape))
    for row, step in enumerate(steps.tolist()):
        torch.testing.assert_close(sample["x_in"][row], inputs[step][row], rtol=1e-4, atol=1e-5)


def test_with_one_step_the_student_sees_pure_noise_at_timestep_399(sd15):
    module = loaded(build(sd15, num_steps=1))
    sample = module.simulate(module.backbone.encode_prompts(["a ring"]), 1)
    assert sample["t"].tolist() == [399]


# --------------------------------------------------------------------------------------------------- numbers that fail


def test_a_teacher_that_gives_nan_is_ignored_and_counted(sd15, tmp_path):
    module = build(sd15)
    clean = module.clean

    def sometimes(prediction, x_t, t):
        x0 = clean(prediction, x_t, t)
        if module.backbone.acting[0] == SCORE and module.backbone.acting[1] != 2.0 and module.generator_step == 1:
            x0[0] = math.nan
        return x0

    module.clean = sometimes
    fit(module, tmp_path, max_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "log/loss_logs/loss_gen_log.jsonl").read_text().splitlines()]
    assert [row["replaced"] for row in rows] == [0.0, 4.0 * 8 * 8, 0.0]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoints/step=3.ckpt").values())


def test_a_student_that_diverged_stops_the_run(sd15, tmp_path):
    with pytest.raises(ValueError, match="lost nan at inner step"):
        fit(build(sd15, lr=1e30, score_lr=1e30, gradient_clip_val=None), tmp_path, max_steps=9)


@pytest.mark.parametrize(("clip", "largest"), [(0.01, 0.01), (None, None)])
def test_each_networks_gradient_is_clipped_before_its_step(clip, largest, sd15, tmp_path):
    module = build(sd15, gradient_clip_val=clip, rewards={"b": Brightness()}, reward_weights={"b": 50.0}, hinge=None)
    steps, original = [], module.on_before_optimizer_step

    def clipped(optimizer):
        original(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append((module.norm.item(), torch.nn.utils.get_total_norm(gradients).item()))

    module.on_before_optimizer_step = clipped
    fit(module, tmp_path, max_steps=1)
    assert len(steps) == 5
    assert max(before for before, _ in steps) > 0.011
    for before, after in steps:
        assert after == pytest.approx(min(before, largest or math.inf), rel=1e-3)


@pytest.mark.parametrize("simulation", ["published", "dmd2"])
def test_float16_gradients_are_logged_and_clipped_without_their_scale(simulation, sd15, tmp_path):
    """One scaler serves both networks: its factor, here doubled at every step of either, must not reach the norms."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    fit(build(sd15, simulation=simulation), tmp_path / "half", max_steps=1, precision=None, plugins=[half])
    fit(build(sd15, simulation=simulation), tmp_path / "single", max_steps=1)
    assert scaler.get_scale() == 64.0 * 2**5
    for network in ("gui", "gen"):
        logs = [tmp_path / run / "log" / "loss_logs" / f"loss_{network}_log.jsonl" for run in ("half", "single")]
        first, second = ([json.loads(line)["gradient_norm"] for line in log.read_text().splitlines()] for log in logs)
        assert first == pytest.approx(second, rel=0.2)


# ------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_raise_what_they_like(sd15, tmp_path):
    rewards = {"rewards": {"bright": Brightness()}, "reward_weights": {"bright": 10.0}, "hinge": None}
    module = build(sd15, adapters=False, lr=3e-3, num_steps=1, ratio=1, dm_weight=0.0, **rewards)
    fit(module, tmp_path, max_steps=6)
    rows = [json.loads(line) for line in (tmp_path / "log/loss_logs/loss_gen_log.jsonl").read_text().splitlines()]
    assert rows[-1]["bright"] > rows[0]["bright"] + 0.01


def test_the_hinge_rewards_nothing_beyond_it(sd15):
    for hinge, expected in ((0.0, False), (0.9, True)):
        settings = {"rewards": {"b": Brightness()}, "reward_weights": {"b": 1.0}, "dm_weight": 0.0}
        module = loaded(build(sd15, hinge=hinge, **settings))
        student, _ = one_step(module, turn=True)["gradients"]
        assert any(g is not None and g.abs().max() > 0 for g in student) == expected


def test_rewards_join_in_after_the_cold_start(sd15, tmp_path):
    module = build(sd15, rewards={"b": Brightness()}, reward_weights={"b": 1.0}, cold_start_steps=2)
    fit(module, tmp_path, max_steps=3)
    rows = [json.loads(line) for line in (tmp_path / "log/loss_logs/loss_gen_log.jsonl").read_text().splitlines()]
    assert ["b" in row for row in rows] == [False, False, True]


def test_relative_rewards_compare_a_wanted_with_an_unwanted_word(sd15):
    reward = Brightness()
    settings = {"rewards": {"b": reward}, "reward_weights": {"b": 5.0}, "relative": ["b"], "srpo_k": 0.25}
    module = loaded(build(sd15, **settings))
    x0 = torch.zeros(2, *module.backbone.latent_shape)
    torch.manual_seed(0)
    scores = [module.score_rewards(x0, ["a ring", "a dog"])["b"] for _ in range(40)]
    images = (module.backbone.decode_latents(x0) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(scores[0], 0.25 * images.mean((1, 2, 3)))
    assert {positive for positive, _ in reward.words} == {"Natural-lighting", "Detailed", "Realistic"}
    assert {negative for _, negative in reward.words} == {"Painting", "CG Render", "Oil"}


@pytest.mark.parametrize("straight_through", [False, True])
def test_saturated_pixels_have_a_gradient_only_if_asked(straight_through, sd15):
    settings = {"rewards": {"b": Brightness()}, "reward_weights": {"b": 1.0}}
    module = loaded(build(sd15, straight_through=straight_through, **settings))
    decode = module.backbone.decode_latents
    module.backbone.decode_latents = lambda latents: decode(latents) + 9.0
    x0 = torch.randn(1, *module.backbone.latent_shape, requires_grad=True)
    score = module.score_rewards(x0, ["a ring"])["b"]
    assert score.item() == pytest.approx(1.0, abs=1e-5)
    score.sum().backward()
    assert (x0.grad.abs().max() > 0) == straight_through


# -------------------------------------------------------------------------------------------- logs, checkpoints, resume


def test_losses_are_valid_json_lines_of_every_step(sd15, tmp_path):
    fit(build(sd15), tmp_path, max_steps=2)
    logs = tmp_path / "log" / "loss_logs"
    fake = [json.loads(line) for line in (logs / "loss_gui_log.jsonl").read_text().splitlines()]
    student = [json.loads(line) for line in (logs / "loss_gen_log.jsonl").read_text().splitlines()]
    assert [(row["in_s"], row["glo_s"]) for row in fake] == [(i, max(0, (i - 1) // 3)) for i in range(7)]
    assert [(row["in_s"], row["glo_s"]) for row in student] == [(4, 1), (7, 2)]
    assert all(row["diff"] > 0 for row in fake)
    assert all({"dmd", "loss", "replaced", "gradient_norm"} <= row.keys() for row in student)


def test_loggers_count_updates_of_the_student(sd15, tmp_path):
    fit(build(sd15), tmp_path, max_steps=3)
    lines = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("step")
    assert sorted({line.split(",")[column] for line in lines[1:]}) == ["0", "1", "2"]


def test_a_checkpoint_holds_adapters_optimizers_and_counters(sd15, tmp_path):
    fit(build(sd15), tmp_path, max_steps=2, every=2)
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["step=2.ckpt"]
    checkpoint = torch.load(tmp_path / "checkpoints" / "step=2.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert {name.split(".lora_A.")[1].split(".")[0] for name in checkpoint["state_dict"] if ".lora_A." in name} == {
        GENERATOR,
        SCORE,
    }
    assert len(checkpoint["optimizer_states"]) == 2
    about = checkpoint["limelight"]
    assert (about["inner_step"], about["generator_step"], about["fake_scale"]) == (7, 2, 2.0)


@pytest.mark.parametrize(
    ("family", "adapters", "precision"),
    [("sd15", True, "32-true"), ("sd15", False, "bf16-mixed"), ("sd3", True, "bf16-mixed")],
)
def test_a_run_resumed_between_updates_repeats_the_whole_one(family, adapters, precision, request, tmp_path):
    pretrained, file = request.getfixturevalue(family), tmp_path / "between.ckpt"
    settings = {"rewards": {"b": Brightness()}, "reward_weights": {"b": 1.0}}
    fit(
        build(pretrained, family, adapters, **settings),
        tmp_path / "whole",
        callbacks=[SaveAt(6, file)],
        precision=precision,
    )
    module = build(pretrained, family, adapters, **settings)
    fit(module, tmp_path / "again", ckpt_path=file, precision=precision)
    assert (module.inner_step, module.generator_step) == (10, 3)
    expected = weights(tmp_path / "whole" / "checkpoints" / "step=3.ckpt")
    actual = weights(tmp_path / "again" / "checkpoints" / "step=3.ckpt")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    for network, after in (("gui", 6), ("gen", 6)):
        logs = [tmp_path / run / "log" / "loss_logs" / f"loss_{network}_log.jsonl" for run in ("whole", "again")]
        whole, again = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
        assert again == [row for row in whole if row["in_s"] >= after]
    last = [(tmp_path / run / "log" / "metrics.csv").read_text().splitlines()[-1] for run in ("whole", "again")]
    assert last[0] == last[1]


def test_sampling_never_disturbs_training(sd15, tmp_path):
    class Sample(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            torch.rand(3)
            pl_module.backbone.generate(["a ring"], [1])
            with pl_module.backbone.reference():
                pl_module.backbone.generate(["a ring"], [1])

    for name, callbacks in (("plain", ()), ("watched", [Sample()])):
        fit(build(sd15), tmp_path / name, max_steps=2, callbacks=callbacks)
    plain, watched = (weights(tmp_path / name / "checkpoints/step=2.ckpt") for name in ("plain", "watched"))
    assert all(torch.equal(watched[name], tensor) for name, tensor in plain.items())


# --------------------------------------------------------------------------------------------------------- second stage


def test_a_resumed_run_uses_the_configured_learning_rates(sd15, tmp_path):
    fit(build(sd15, lr=1e-3, score_lr=2e-3), tmp_path / "one", max_steps=1)
    module = build(sd15, lr=1e-4, score_lr=3e-4)
    runner = fit(module, tmp_path / "two", max_steps=2, ckpt_path=tmp_path / "one/checkpoints/step=1.ckpt")
    assert [optimizer.param_groups[0]["lr"] for optimizer in runner.optimizers] == [1e-4, 3e-4]


@pytest.mark.parametrize("keep", [False, True])
def test_the_second_stage_starts_from_the_firsts_weights_with_its_own_rates(keep, sd15, tmp_path):
    fit(build(sd15), tmp_path / "one", max_steps=2)
    checkpoint = tmp_path / "one" / "checkpoints" / "step=2.ckpt"
    first = torch.load(checkpoint, weights_only=True)
    start = {}

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 0 and not start:
                start["weights"] = {n: p.detach().clone() for n, p in pl_module.trained_parameters().items()}
                start["states"] = [len(optimizer.state) for optimizer in trainer.optimizers]
                start["rates"] = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
                start["steps"] = (pl_module.inner_step, pl_module.generator_step, trainer.global_step)

    module = build(sd15, lr=5e-4, score_lr=2e-4, start_from=str(checkpoint), keep_optimizers=keep)
    fit(module, tmp_path / "two", max_steps=1, callbacks=[Look()])
    assert all(torch.equal(start["weights"][name], tensor) for name, tensor in first["state_dict"].items())
    assert start["rates"] == [5e-4, 2e-4]
    assert all(number > 0 for number in start["states"]) == keep
    assert start["steps"] == (0, 0, 0)
    assert module.generator_step == 1


def test_a_second_stage_of_another_model_is_refused(sd15, tmp_path):
    fit(build(sd15), tmp_path / "one", max_steps=1)
    module = build(sd15, adapters=False, start_from=str(tmp_path / "one/checkpoints/step=1.ckpt"))
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(module, tmp_path / "two", max_steps=1)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; expected 1 or more"),
        ({"ratio": 0}, "ratio is 0; expected 1 or more"),
        ({"fake_scale": 0.0}, "without the adapter the fake score is the teacher"),
        ({"renoise": "logit_normal"}, "renoise is 'logit_normal'; expected one of beta, uniform"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; expected one of sde, ode"),
        ({"timesteps": [999.0]}, "timesteps is \\[999.0\\]; expected 2 numbers"),
        ({"timesteps": [1.0, 999.0]}, "expected decreasing"),
        ({"dm_weight": 0.0}, "dm_weight is 0.0; expected a positive number; 0 needs rewards"),
        ({"rewards": {"b": Brightness()}}, "expected a weight for each of \\['b'\\]"),
        ({"keep_optimizers": True}, "false where start_from is null"),
        ({"relative": ["b"]}, "relative is \\['b'\\]"),
        ({"guidance_jitter": 3.0}, "less than the guidance"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message, sd15):
    with pytest.raises(ValueError, match=message):
        build(sd15, **settings)


def test_a_score_network_without_its_adapter_is_refused(sd15):
    with pytest.raises(ValueError, match="without it teacher and fake score are one"):
        DMDR(backbone_of("sd15", sd15), None)


def test_rewards_without_gradient_or_relative_score_are_refused(sd15):
    class Judge(Reward):
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    with pytest.raises(ValueError, match=r"model.rewards.j: Judge gives no gradient"):
        build(sd15, rewards={"j": Judge()}, reward_weights={"j": 1.0})
    judge = Judge()
    judge.differentiable = True
    with pytest.raises(ValueError, match=r"Judge \(j\) has no relative score"):
        build(sd15, rewards={"j": judge}, reward_weights={"j": 1.0}, relative=["j"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, "set model.gradient_clip_val instead"),
        ({"accumulate_grad_batches": 2}, "set model.micro_batch_size"),
    ],
)
def test_what_the_method_does_itself_the_trainer_must_not(settings, message, sd15, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(build(sd15), tmp_path, **settings)


def test_micro_batches_must_divide_the_batch(sd15, tmp_path):
    with pytest.raises(ValueError, match="micro_batch_size is 2 and data.batch_size 3"):
        fit(build(sd15, micro_batch_size=2), tmp_path, batch_size=3)


def test_a_missing_first_stage_is_named_before_anything_is_loaded(sd15, tmp_path):
    module = build(sd15, start_from=str(tmp_path / "gone.ckpt"))
    with pytest.raises(ValueError, match=r"there is no file .*gone.ckpt"):
        fit(module, tmp_path)
    assert not module.backbone.loaded


def test_a_schedule_that_ends_in_pure_noise_is_refused(sdxl_turbo, tmp_path):
    with pytest.raises(ValueError, match="ends in pure noise"):
        fit(build(sdxl_turbo, "sdxl"), tmp_path)
