"""The toy model as a flow says what the toy model says."""

import torch

from lightning_modules.backbones.sd15 import SD15
from tests.toy_flow import ToyFlow

PIPELINE = "datamodules/toy_world/pipeline"


def test_the_toy_flow_predicts_the_images_of_the_toy_model(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    ordinary, flow = SD15(PIPELINE), ToyFlow(PIPELINE)
    for backbone in (ordinary, flow):
        backbone.load()
    x_0, noise = torch.randn(2, 3, 4, 8, 8)
    condition = ordinary.encode_prompts(["a red circle"] * 3)
    t = torch.tensor([20, 400, 980])
    ratio = ordinary.sigmas[t] / ordinary.alphas[t]
    s = 1000 * ratio / (1 + ratio)
    with torch.no_grad():
        x_t, _ = ordinary.add_noise(x_0, noise, t)
        x_s, _ = flow.add_noise(x_0, noise, s)
        expected = ordinary.to_x0(ordinary.predict(x_t, t, condition), x_t, t)
        actual = flow.to_x0(flow.predict(x_s, s, condition), x_s, s)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
