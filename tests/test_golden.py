"""The reference's numbers: state-dict layout, UNet output, forward process, reverse mean and
schedules, from files.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nets import GaussianDiffusion, UNet, generate_cosine_schedule, generate_linear_schedule

DATA = Path(__file__).parent / "data"
CLOSE = {"rtol": 0, "atol": 1e-4}


def fill(unet):
    """The rule by which the weights behind the files were made."""
    for i, (name, p) in enumerate(sorted(unet.named_parameters())):
        wave = torch.sin(0.1 * (i + 1) + 0.37 * torch.arange(p.numel(), dtype=torch.float64)).reshape(p.shape)
        if p.ndim > 1:
            value = wave * (p.numel() / p.shape[0]) ** -0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * wave
        else:
            value = 0.05 * wave
        p.data.copy_(value)


@pytest.fixture(params=["unet_unconditional", "unet_conditional"])
def case(request):
    golden = np.load(DATA / f"{request.param}.npz")
    config = json.loads(str(golden["config"]))
    size, batch, y, T = (config.pop(key) for key in ("size", "batch", "y", "num_timesteps"))
    unet = UNet(**config)
    fill(unet)
    diffusion = GaussianDiffusion(
        unet, size, config["img_channels"], config.get("num_classes"), generate_linear_schedule(T, 1e-4, 0.02)
    ).eval()
    shape = (batch, config["img_channels"], *size)
    x = torch.cos(0.05 * torch.arange(np.prod(shape), dtype=torch.float64)).float().reshape(shape)
    noise = torch.sin(0.11 * torch.arange(np.prod(shape), dtype=torch.float64)).float().reshape(shape)
    t = torch.linspace(0, T - 1, batch).round().long()
    return golden, diffusion, x, noise, t, None if y is None else torch.tensor(y)


def test_timesteps_are_those_of_the_file(case):
    golden, _, _, _, t, _ = case
    torch.testing.assert_close(t, torch.from_numpy(golden["t"]))


def test_state_dict_has_the_references_keys_and_shapes(case):
    golden, diffusion = case[:2]
    shapes = {key: list(value.shape) for key, value in diffusion.state_dict().items()}
    assert shapes == json.loads(str(golden["state_dict_shapes"]))


def test_unet_output(case):
    golden, diffusion, x, _, t, y = case
    with torch.no_grad():
        output = diffusion.model(x, t, y)
    torch.testing.assert_close(output, torch.from_numpy(golden["unet_output"]), **CLOSE)


def test_perturb_x(case):
    golden, diffusion, x, noise, t, _ = case
    torch.testing.assert_close(diffusion.perturb_x(x, t, noise), torch.from_numpy(golden["perturbed"]), **CLOSE)


def test_remove_noise(case):
    golden, diffusion, x, _, t, y = case
    expected = torch.from_numpy(golden["reverse_mean"])
    torch.testing.assert_close(diffusion.remove_noise(x, t, y, use_ema=False), expected, **CLOSE)


def test_schedules(case):
    golden = case[0]
    np.testing.assert_allclose(generate_linear_schedule(1000, 1e-4, 0.02), golden["linear"], rtol=1e-12)
    np.testing.assert_allclose(generate_cosine_schedule(1000), golden["cosine"], rtol=1e-9)
