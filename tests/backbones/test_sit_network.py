"""The SiT network: golden numbers, the published layout, real size, its adapters, recomputation."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.sit_network import (
    SIZES,
    QueryValueAdapter,
    SiTConfig,
    SiTNetwork,
    position_table,
    preset,
    time_sinusoid,
)
from tests.golden_cases import load_case

TINY = SiTConfig(depth=2, width=32, heads=4, sample_size=8, num_classes=10)


def network(seed: int = 0, rank: int | None = 3, **settings) -> SiTNetwork:
    """A tiny SiT whose weights, adapters included, are all away from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SiTNetwork(TINY)
        if rank is not None:
            net.add_adapter(rank, std=0.5)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return net


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([0.2, 1.0, 0.6]), torch.tensor([0, 10, 7])


def test_golden_network():
    case, _ = load_case("dmdr", "sit_network")
    weights = {name.removeprefix("sd."): value for name, value in case.items() if name.startswith("sd.")}
    net = SiTNetwork(SiTConfig(depth=1, width=32, heads=4, sample_size=8, num_classes=10))
    net.add_adapter(rank=4)
    assert torch.equal(net.pos_embed, weights["pos_embed"])
    net.load_state_dict(weights)
    for scale, expected in zip(case["scales"].tolist(), case["out"], strict=True):
        out = net(case["x"], case["t"], case["y"], adapter_scale=scale)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def published_keys(depth: int) -> set[str]:
    linears = ["t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    linears += ["x_embedder.proj"]
    for i in range(depth):
        linears += [f"blocks.{i}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        linears += [f"blocks.{i}.adaLN_modulation.1"]
    names = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    return names | {"pos_embed", "y_embedder.embedding_table.weight"}


def test_real_size_on_the_meta_device():
    with torch.device("meta"):
        net = SiTNetwork(preset("XL/2"))
        assert set(net.state_dict()) == published_keys(28)
        assert sum(value.numel() for value in net.state_dict().values()) == pytest.approx(675.1e6, rel=1e-4)
        assert net.state_dict()["y_embedder.embedding_table.weight"].shape == (1001, 1152)
        assert net.state_dict()["pos_embed"].shape == (1, 256, 1152)
        before = sum(p.numel() for p in net.parameters())
        net.add_adapter(32)
        added = [name for name in net.state_dict() if name not in published_keys(28)]
        assert added[:4] == [f"blocks.0.attn.lora.lora_{which}" for which in ("QA", "QB", "VA", "VB")]
        assert sum(p.numel() for p in net.parameters()) - before == pytest.approx(4.13e6, rel=1e-3)
        arguments = (torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64))
        counts = []
        for scale in (0.0, 2.0):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(*arguments, scale)
            counts.append(counter.get_total_flops())
    assert counts[0] == pytest.approx(0.24e12, rel=0.02)
    assert counts[0] < counts[1] < 1.02 * counts[0]  # an adapter that is off costs nothing


@pytest.mark.parametrize("size", [f"{letters}/{patch}" for letters in SIZES for patch in (2, 4, 8)])
def test_every_preset_runs(size):
    with torch.device("meta"):
        net = SiTNetwork(preset(size))
        assert net(torch.empty(2, 4, 32, 32), torch.empty(2), torch.zeros(2, dtype=torch.int64)).shape == (2, 4, 32, 32)


def test_sizes_have_the_published_numbers_of_weights():
    for size, millions in (("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)):
        with torch.device("meta"):
            count = sum(p.numel() for p in SiTNetwork(preset(size)).parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.02), size


def test_positions_and_times_tell_where_and_when():
    table = position_table(8, 3)[0].view(3, 3, 8)
    assert table[0, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    column, row = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])  # the place itself, and a hundredth of it
    expected = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()])
    torch.testing.assert_close(table[1, 2], expected)
    angles = torch.tensor([[0.5, 0.005]])
    torch.testing.assert_close(time_sinusoid(torch.tensor([0.5]), 4), torch.cat([angles.cos(), angles.sin()], 1))


def test_new_adapters_change_nothing_and_learn():
    torch.manual_seed(0)
    net, bare = network(rank=None), network(rank=None)
    net.requires_grad_(False)
    net.add_adapter(3)
    adapter = net.blocks[0].attn.lora
    assert adapter.lora_QA.std().item() == pytest.approx(1.0, rel=0.3)
    assert adapter.lora_QB.abs().max() == adapter.lora_VB.abs().max() == 0
    torch.testing.assert_close(net(*inputs(), adapter_scale=2.0), bare(*inputs()))
    net(*inputs(), adapter_scale=2.0).square().mean().backward()
    assert all(block.attn.lora.lora_QB.grad.abs().max() > 0 for block in net.blocks)
    trained = [name for name, parameter in net.named_parameters() if parameter.grad is not None]
    assert trained
    assert all(".lora." in name for name in trained)


def test_adapter_acts_on_the_projected_queries_and_values():
    adapter = QueryValueAdapter(4, 2)
    adapter.lora_QB.data.normal_()
    adapter.lora_VB.data.normal_()
    q, v = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    changed_q, changed_v = adapter(q, v, 0.5)
    torch.testing.assert_close(changed_q, q @ (torch.eye(4) + 0.5 * adapter.lora_QA @ adapter.lora_QB))
    torch.testing.assert_close(changed_v, v @ (torch.eye(4) + 0.5 * adapter.lora_VA @ adapter.lora_VB))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_recomputation_gives_the_same_gradients_in_any_order_of_scales(scale):
    """The scale is an argument of each block: a call at another scale before the backward pass does not reach it."""
    gradients = []
    for recompute in (False, True):
        net = network()
        if recompute:
            net.enable_gradient_checkpointing()
        out = net(*inputs(), adapter_scale=scale)
        with torch.no_grad():
            net(*inputs(), adapter_scale=0.7)
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_positions_are_no_parameter():
    net = network()
    assert "pos_embed" in net.state_dict()
    assert "pos_embed" not in dict(net.named_parameters())


def test_classes_and_times_matter():
    net = network()
    x, t, y = inputs()
    plain = net(x, t, y)
    assert (net(x, t, y.roll(1)) - plain).abs().max() > 1e-3
    assert (net(x, t.roll(1), y) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("size", ["XL", "XL/3", "XXL/2", "xl/2", "/2", "XL/2/2"])
def test_unknown_sizes_are_named(size):
    with pytest.raises(ValueError, match="there is no size .*such as XL/2"):
        preset(size)


def test_mistakes_in_use_are_named():
    with pytest.raises(ValueError, match="multiple of the heads"):
        SiTNetwork(SiTConfig(depth=1, width=30, heads=4))
    with pytest.raises(ValueError, match="rank of the adapter is 0"):
        network(rank=None).add_adapter(0)
    x, t, y = inputs()
    with pytest.raises(ValueError, match="latents of 8 x 8, not 8 x 16"):
        network()(torch.cat([x, x], -1), t, y)
    with pytest.raises(ValueError, match="scale of the adapter is 2.0, but the network has none"):
        network(rank=None)(x, t, y, 2.0)
