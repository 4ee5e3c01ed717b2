"""What a GPU would run, on fake CUDA tensors: real devices and shapes, no values.

Mixing devices raises, as on a GPU. The backward pass needs a driver, so it only fills in gradients.
Fake tensors know no generators, so draws do without.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp import autocast_mode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nets import SAMPLERS
from utils.data.dataset import normalize
from utils.device import DTYPES, AsyncHostCopy
from utils.evaluate.classifier import FeatureNet
from utils.evaluate.features import Extractor
from utils.evaluate.likelihood import variational_bound
from utils.training import run_files, validation
from utils.training.meter import Meter
from utils.training.optimizer import make_optimizer

CUDA = torch.device("cuda", 0)


def makes_fake_cuda_tensors():
    """PyTorch 2.6 asks the driver even for an index of fake ones."""
    try:
        with FakeTensorMode():
            torch.arange(2, device=CUDA)[:, None]
    except (RuntimeError, AssertionError):  # no driver, or a build without CUDA
        return False
    return True


pytestmark = pytest.mark.skipif(not makes_fake_cuda_tensors(), reason="this PyTorch fakes no CUDA without a driver")
SMALL = {
    "input_shape": (8, 8),
    "channel": 32,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "batch_size": 8,
    "num_timesteps": 20,
    "preview_steps": 3,
    "ema_start": 0,
    "device": "cpu",
    "compile": False,
    "val_split": 0.3,
    "num_groups": 8,
    "init_lr": 1e-3,
}


class NoGenerator:
    """Stands in for torch.Generator: draws on fake tensors give no values anyway."""

    def __init__(self, device=None):
        self.device = torch.device(device or "cpu")

    def manual_seed(self, seed):
        return self


def to_fake(mode, tensor):
    with mode:
        return mode.from_tensor(tensor).to(CUDA)


def to_fake_module(mode, module, keep=()):
    """The module with all its tensors on the fake GPU, but the buffers named in `keep`, which stay
    on the host.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = to_fake(mode, parameter.detach())
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in keep:
                part._buffers[name] = to_fake(mode, buffer)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """A FakeTensorMode in which code for CUDA runs."""
    for name in ("randint", "randn", "rand"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _real=real, generator=None, **options: _real(*args, **options))
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    # pinned memory needs a driver
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(AsyncHostCopy, "push", lambda self, tensor: setattr(self, "pushed", tensor))
    monkeypatch.setattr(
        autocast_mode.torch.amp.autocast_mode, "is_autocast_available", lambda device: True, raising=False
    )
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def parts(workplace, gpu, monkeypatch):
    """A function of settings -> (config, TrainContext on the fake GPU)."""

    def make(keep=(), **settings):
        config = train.Config(**{**SMALL, "precision": "fp32", **settings})
        built = train.prepare(config, torch.device("cpu"), None, train.saved_settings(config, config, []))
        diffusion = to_fake_module(gpu, built.diffusion, keep)
        trained = [parameter for parameter in diffusion.parameters() if parameter.requires_grad]
        with gpu:
            optimizer = make_optimizer(config.optimizer_type, trained, CUDA)
            meter = Meter(CUDA, config.num_timesteps)
        fills = {"grad": lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in trained]}
        monkeypatch.setattr(torch.Tensor, "backward", lambda self: fills["grad"]())
        return config, built._replace(
            device=CUDA,
            diffusion=diffusion,
            model=diffusion,
            optimizer=optimizer,
            meter=meter,
            layout=torch.channels_last if config.precision != "fp32" else torch.contiguous_format,
        )

    return make


def one_step(config, parts):
    images, labels = parts.dataset.batch(range(8))
    train.train_step(config, parts, images, labels, 0, 0, 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"class_conditional": True},
        {"accumulate": 2, "horizontal_flip": True},
        {"prediction": "v", "loss_weighting": "min_snr", "timestep_sampling": "middle"},
        {"activation_checkpointing": True},
        {"optimizer_type": "muon"},
    ],
)
def test_a_training_step_stays_on_the_gpu(parts, gpu, monkeypatch, precision, settings):
    config, built = parts(precision=precision, **settings)
    dtypes, forward = set(), torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: dtypes.add((out := forward(self, x)).dtype) or out)
    with gpu:
        one_step(config, built)
    assert dtypes == {DTYPES[precision]}  # autocast reaches the network
    assert isinstance(built.meter.sums, FakeTensor) and built.meter.sums.device == CUDA
    assert {p.device for p in built.diffusion.ema_model.parameters()} == {CUDA}
    assert {value.device for state in built.optimizer.state.values() for value in state.values()} == {CUDA}


def test_a_table_left_on_the_host_is_seen(parts, gpu):
    config, built = parts(keep=("sqrt_alphas_cumprod",))
    with gpu, pytest.raises(RuntimeError, match="device"):
        one_step(config, built)


def test_validation_and_preview_stay_on_the_gpu(parts, gpu, monkeypatch):
    """What leaves the GPU at their ends are values, which fake tensors do not have: both are
    looked at just before.
    """
    config, built = parts(class_conditional=True)
    sums, images = [], []

    def take_sums(total):
        sums.append(total)
        return np.ones(2)

    monkeypatch.setattr(validation.distributed, "sum_over_ranks", take_sums)
    monkeypatch.setattr(run_files, "to_uint8", lambda x: images.append(x))
    monkeypatch.setattr(run_files, "make_grid", lambda pixels, columns: None)
    with gpu:
        validation.validation_loss(config, built)
        run_files.sample_preview(config, built)
    assert sums[0].device == images[0].device == CUDA and images[0].shape == (25, 3, 8, 8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_each_solver_stays_on_the_gpu(parts, gpu, sampler, guidance):
    _, built = parts(class_conditional=True)
    with gpu:
        y = torch.zeros(4, dtype=torch.long, device=CUDA)
        for x, x_0 in built.diffusion.eval().sample_steps(
            4, CUDA, y, sampler=sampler, steps=4, guidance_scale=guidance, seeds=range(4)
        ):
            assert x.device == x_0.device == CUDA and x.shape == (4, 3, 8, 8)


class NoFloat64(TorchDispatchMode):
    """Fails where the GPU would hold float64, which Apple's do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            wide = torch.is_tensor(tensor) and tensor.dtype == torch.float64 and tensor.device.type == "cuda"
            assert not wide, f"{function} makes float64"
        return out


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_nothing_but_the_meter_is_float64_on_the_gpu(parts, gpu, monkeypatch, optimizer):
    settings = {"class_conditional": True, "horizontal_flip": True, "timestep_sampling": "middle"}
    config, built = parts(optimizer_type=optimizer, **settings)
    monkeypatch.setattr(validation.distributed, "sum_over_ranks", lambda total: np.ones(2))
    with gpu, NoFloat64():
        with pytest.raises(AssertionError, match="makes float64"):
            one_step(config, built)
        built.meter.dtype = torch.float32  # as on MPS
        built.meter.reset()
        one_step(config, built)
        validation.validation_loss(config, built)
        y, x = torch.zeros(4, dtype=torch.long, device=CUDA), torch.zeros(4, 3, 8, 8, device=CUDA)
        for sampler in SAMPLERS:
            built.diffusion.sample(4, CUDA, y, sampler=sampler, steps=4, guidance_scale=2.0, seeds=range(4))
        variational_bound(built.diffusion.denoiser(y), built.diffusion.alpha_bars, x)


def test_inpainting_and_starting_images_stay_on_the_gpu(parts, gpu):
    _, built = parts()
    with gpu:
        known, mask = torch.zeros(4, 3, 8, 8), torch.ones(1, 1, 8, 8)  # from files, on the host
        options = {"sampler": "ddpm", "steps": 4, "init": known, "known": known, "mask": mask, "resamplings": 2}
        for x, _ in built.diffusion.eval().sample_steps(4, CUDA, **options):
            assert x.device == CUDA


def test_features_stay_on_the_gpu_until_they_are_kept(gpu, monkeypatch):
    net = to_fake_module(gpu, FeatureNet(3, 2).eval())
    monkeypatch.setattr("utils.evaluate.features.weights_digest", lambda weights: "fake")
    with gpu:
        features = Extractor(net, "fake", CUDA, 4)(torch.zeros(6, 8, 8, 3, dtype=torch.uint8))
    assert features.shape == (6, 128) and features.device.type == "cpu"


def test_pixels_are_normalized_on_the_gpu(gpu):
    with gpu:
        x = normalize(
            torch.zeros(2, 8, 8, 3, dtype=torch.uint8), CUDA, torch.ones(2, dtype=torch.bool), torch.channels_last
        )
        assert x.device == CUDA and x.shape == (2, 3, 8, 8)
