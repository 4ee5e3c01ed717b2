"""The candidates of NOTES.md, each compared with the path that it would replace.

python -m benchmarks.ablations --sections step
"""

import copy
import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.timing import CLOCKS, interleave, markdown, read_names, spread, usable_cores
from nets import GaussianDiffusion, UNet, cpu_fused, unet
from utils.device import DTYPES, autocast, choose_device, choose_precision, round_weights
from utils.errors import run_script
from utils.settings import choice, flag, parse, settings, text, whole
from utils.training.optimizer import make_optimizer

CHANNELS_LAST = torch.channels_last
ALL = "step,parts,norm,dropout,attention,upsample,sampling,checkpointing"


# fmt: off
@settings
class Config:
    sections: str = ALL      # what is compared, with commas between
    channel: int = 64        # width of the network
    batch_size: int = 16     # images per step, 32x32
    rounds: int = 7          # interleaved rounds
    threads: int = 1         # of PyTorch; 0: one per core
    clock: str = "cpu"       # cpu: the time of this process alone, for a busy machine; with one thread
    device: str = "auto"     # auto, cuda or cpu
    precision: str = "auto"  # mixed-precision dtype of whole networks
    profile: bool = False    # print where the network's time goes instead
# fmt: on


SETTINGS = {
    "sections": text(),
    "channel": whole(1, 2**16),
    "batch_size": whole(1),
    "rounds": whole(1),
    "threads": whole(0, 1024),
    "clock": choice(CLOCKS),
    "device": text(),
    "precision": choice(("auto", *DTYPES)),
    "profile": flag(),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
    chosen = read_names("sections", config.sections, SECTIONS)
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or usable_cores())
    config = replace(config, precision=choose_precision(config.precision, device))
    if config.profile:
        print_profile(config, device)
        return
    rows = []
    for name in chosen:
        functions = SECTIONS[name](config, device)
        for what, seconds in interleave(functions, config.rounds, device, clock=config.clock).items():
            time = {key: f"{value * 1e3:,.1f}" for key, value in spread(seconds).items()}
            rows.append((name, what, f"{time['median']} ms", f"{time['low']} to {time['high']}"))
    print(markdown(("section", "what", "median", "quartiles"), rows))


def network_of(config, device, layout=torch.contiguous_format, fused=True):
    """A network, with the fused path of nets/cpu_fused.py or of plain operations."""
    torch.manual_seed(0)
    network = UNet(3, base_channels=config.channel)
    network = cpu_fused.install(network) if fused else network
    return network.to(device, memory_format=layout).train()


def batch_of(config, device, layout=torch.contiguous_format):
    x = torch.randn(config.batch_size, 3, 32, 32, device=device).to(memory_format=layout)
    return x, torch.randint(0, 1000, (config.batch_size,), device=device)


def backward(config, network, batch):
    """A function: forward and backward pass of a network."""

    def step():
        with autocast(batch[0].device, config.precision):
            loss = network(*batch).float().square().mean()
        loss.backward()

    return step


def step_section(config, device):
    functions = {}
    for name, layout in (("PyTorch's own layout", torch.contiguous_format), ("channels_last", CHANNELS_LAST)):
        batch = batch_of(config, device, layout)
        functions[f"{name}, plain"] = backward(config, network_of(config, device, layout, fused=False), batch)
        functions[f"{name}, fused norm"] = backward(config, network_of(config, device, layout), batch)
    return functions


def parts_section(config, device):
    """What a training step does outside the network, on the gradients of one."""
    diffusion = GaussianDiffusion(network_of(config, device, CHANNELS_LAST), (32, 32), 3).to(device)
    trained = list(diffusion.model.parameters())
    step = backward(config, diffusion.model, batch_of(config, device, CHANNELS_LAST))
    optimizer = make_optimizer("adam", trained, device)
    step()
    diffusion.ema_step = diffusion.ema_start
    return {
        "network, forward and backward": step,
        "clipping": lambda: clip_grad_norm_(trained, 1.0),
        "fused Adam": optimizer.step,
        "EMA": diffusion.update_ema,
    }


def print_profile(config, device):
    """The operations of a forward and a backward pass by their own time."""
    step = backward(config, network_of(config, device, CHANNELS_LAST), batch_of(config, device, CHANNELS_LAST))
    for _ in range(2):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(config.rounds):
            step()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(
        markdown(
            ("operation", "fraction of the time"),
            [(event.key, f"{event.self_cpu_time_total / total:.1%}") for event in events[:16]],
        )
    )


def gradients(function, *tensors):
    """A function: forward and backward pass of `function`."""
    grad = torch.ones_like(function(*tensors))

    def step():
        function(*tensors).backward(grad)
        for tensor in tensors:
            tensor.grad = None

    return step


def images(config, device, channels, size, dtype=torch.float32):
    x = torch.randn(config.batch_size, channels, size, size, device=device, dtype=dtype)
    return x.to(memory_format=CHANNELS_LAST).requires_grad_()


def plain(norm, activation, x, conv):
    return conv(activation(norm(x)))


def norm_section(config, device):
    functions, channels = {}, config.channel
    for dtype, size in ((torch.float32, 32), (torch.bfloat16, 32), (torch.bfloat16, 16)):
        x = images(config, device, channels, size, dtype)
        norm = nn.GroupNorm(32, channels).to(device)
        conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype).to(memory_format=CHANNELS_LAST)
        paths = {"plain": plain, "compiled": torch.compile(plain, dynamic=True), "fused": cpu_fused.norm_act_conv}
        for name, path in paths.items():
            whole = functools.partial(lambda path, norm, conv, x: path(norm, F.silu, x, conv), path, norm, conv)
            functions[f"{name}, {size}x{size}, {dtype}"] = gradients(whole, x)
    return functions


def dropout_section(config, device):
    x = images(config, device, config.channel, 32)
    values, mask = x.detach().clone(), cpu_fused.sample_mask(x, 0.1)[0]
    half = values.bfloat16()
    return {
        "F.dropout, forward and backward": gradients(lambda x: F.dropout(x, 0.1), x),
        "bernoulli_ alone": lambda: torch.empty_like(values).bernoulli_(0.9),
        "16 random bits alone": lambda: cpu_fused.sample_mask(values, 0.1),
        "masked_fill_ with such a mask, float32": lambda: values.masked_fill_(mask, 0),
        "bits of such a mask, float32": lambda: cpu_fused.drop(values, cpu_fused.keep_bits(mask, values.dtype)),
        "masked_fill_ with such a mask, bf16": lambda: half.masked_fill_(mask, 0),
        "bits of such a mask, bf16": lambda: cpu_fused.drop(half, cpu_fused.keep_bits(mask, half.dtype)),
    }


def attention_section(config, device):
    def products(x):
        q, k, v = x.chunk(3, -1)
        return torch.softmax(q @ (k.transpose(1, 2) * q.shape[-1] ** -0.5), -1) @ v

    def kernel(x):
        return F.scaled_dot_product_attention(*x.unsqueeze(1).chunk(3, -1))

    functions = {}
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(config.batch_size, 256, 6 * config.channel, device=device, dtype=dtype, requires_grad=True)
        functions[f"scaled_dot_product_attention, {dtype}"] = gradients(kernel, qkv)
        functions[f"plain products, {dtype}"] = gradients(products, qkv)
    return functions


def upsample_section(config, device):
    """Nearest neighbor and a 3x3 convolution as one transposed convolution of 4x4."""
    functions = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = unet.Upsample(2 * config.channel).to(device, dtype, memory_format=CHANNELS_LAST)
        x = images(config, device, 2 * config.channel, 16, dtype)

        def transposed(x, conv=layer.upsample[1]):
            wide = F.pad(conv.weight, (1, 1, 1, 1))
            wide = wide[..., 1:] + wide[..., :-1]
            wide = (wide[..., 1:, :] + wide[..., :-1, :]).flip(2, 3).transpose(0, 1)
            return F.conv_transpose2d(x, wide.contiguous(memory_format=CHANNELS_LAST), conv.bias, stride=2, padding=1)

        if dtype == torch.float32:
            torch.testing.assert_close(layer(x), transposed(x), atol=1e-4, rtol=1e-3)
        for name, path in {"plain": layer, "transposed": transposed}.items():
            functions[f"{name}, forward and backward, {dtype}"] = gradients(path, x)
            functions[f"{name}, forward, {dtype}"] = torch.no_grad()(lambda path=path, x=x: path(x))
    return functions


def sampling_section(config, device):
    network = network_of(config, device, CHANNELS_LAST).eval().requires_grad_(False)
    own, rounded = network_of(config, device).eval().requires_grad_(False), copy.deepcopy(network)
    unfused = network_of(config, device, CHANNELS_LAST, fused=False).eval().requires_grad_(False)
    for half_precision in (rounded, unfused):
        round_weights(half_precision, "bf16")
    batch = batch_of(config, device, CHANNELS_LAST)
    one = [tensor[:1] for tensor in batch]

    def half(network, batch):
        def call():
            with torch.no_grad(), autocast(device, "bf16"):
                network(*batch)

        return call

    return {
        "fp32, PyTorch's own layout": torch.no_grad()(lambda: own(*batch)),
        "fp32, channels_last": torch.no_grad()(lambda: network(*batch)),
        "fp32, channels_last, inference_mode": torch.inference_mode()(lambda: network(*batch)),
        "bf16, plain": half(unfused, batch),
        "bf16, fused norm": half(rounded, batch),
        "bf16, one image": half(network, one),
        "bf16, one image, rounded weights": half(rounded, one),
    }


def checkpointing_section(config, device):
    network, batch = network_of(config, device, CHANNELS_LAST), batch_of(config, device, CHANNELS_LAST)
    saving = copy.deepcopy(network)
    saving.activation_checkpointing = True
    return {
        "all activations kept": backward(config, network, batch),
        "activation checkpointing": backward(config, saving, batch),
    }


SECTIONS = {
    "step": step_section,
    "parts": parts_section,
    "norm": norm_section,
    "dropout": dropout_section,
    "attention": attention_section,
    "upsample": upsample_section,
    "sampling": sampling_section,
    "checkpointing": checkpointing_section,
}


if __name__ == "__main__":
    run_script(main)
