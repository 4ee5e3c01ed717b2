"""Checkpoints of w86763777/pytorch-ddpm, against its network written anew from its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import newest_run, read_file, run_main, write_pictures

from nets import build
from utils.checkpoint.file import load_checkpoint
from utils.convert.__main__ import import_weights

WIDTH, MULTS, BLOCKS, ATTENTION = 32, (1, 2, 2, 2), 2, (1,)  # its defaults at a quarter of the width


def their_weights(T=1000, seed=0):
    """A state dict with its keys and shapes, level by level, of random numbers."""
    generator, weights = torch.Generator().manual_seed(seed), {}

    def layer(name, out, *inputs):
        norm = not inputs
        weight = torch.randn(out, *inputs, generator=generator)
        weights[f"{name}.weight"] = 1 + 0.3 * weight if norm else weight * weight[0].numel() ** -0.5
        weights[f"{name}.bias"] = 0.3 * torch.randn(out, generator=generator)

    def block(name, before, after, attention):
        layer(f"{name}.block1.0", before)
        layer(f"{name}.block1.2", after, before, 3, 3)
        layer(f"{name}.temb_proj.1", after, 4 * WIDTH)
        layer(f"{name}.block2.0", after)
        layer(f"{name}.block2.3", after, after, 3, 3)
        if before != after:
            layer(f"{name}.shortcut", after, before, 1, 1)
        if attention:
            layer(f"{name}.attn.group_norm", after)
            for part in ("proj_q", "proj_k", "proj_v", "proj"):
                layer(f"{name}.attn.{part}", after, after, 1, 1)

    angles = torch.arange(T)[:, None] * torch.exp(-torch.arange(0, WIDTH, 2) / WIDTH * math.log(10000))
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)  # sine, cosine, sine, ...
    weights["time_embedding.timembedding.0.weight"] = table
    layer("time_embedding.timembedding.1", 4 * WIDTH, WIDTH)
    layer("time_embedding.timembedding.3", 4 * WIDTH, 4 * WIDTH)
    layer("head", WIDTH, 3, 3, 3)
    channels, number = [WIDTH], 0
    for level, mult in enumerate(MULTS):
        for _ in range(BLOCKS):
            block(f"downblocks.{number}", channels[-1], WIDTH * mult, level in ATTENTION)
            channels, number = [*channels, WIDTH * mult], number + 1
        if level < len(MULTS) - 1:
            layer(f"downblocks.{number}.main", channels[-1], channels[-1], 3, 3)
            channels, number = [*channels, channels[-1]], number + 1
    now, number = channels[-1], 0
    block("middleblocks.0", now, now, True)
    block("middleblocks.1", now, now, False)
    for level, mult in reversed(list(enumerate(MULTS))):
        for _ in range(BLOCKS + 1):
            block(f"upblocks.{number}", channels.pop() + now, WIDTH * mult, level in ATTENTION)
            now, number = WIDTH * mult, number + 1
        if level:
            layer(f"upblocks.{number}.main", now, now, 3, 3)
            number += 1
    layer("tail.0", now)
    layer("tail.2", 3, now, 3, 3)
    return weights


def their_output(weights, x, t):
    """What its network computes, from the weights by name."""

    def conv(name, h, **options):
        weight = weights[f"{name}.weight"]
        return F.conv2d(h, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def norm(name, h):
        return F.group_norm(h, 32, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name, h):
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def block(name, h):
        inner = conv(f"{name}.block1.2", F.silu(norm(f"{name}.block1.0", h)))
        inner = inner + linear(f"{name}.temb_proj.1", F.silu(time))[:, :, None, None]
        inner = conv(f"{name}.block2.3", F.silu(norm(f"{name}.block2.0", inner)))
        out = inner + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in weights else h)
        if f"{name}.attn.proj.weight" not in weights:
            return out
        normed = norm(f"{name}.attn.group_norm", out)
        q, k, v = (conv(f"{name}.attn.proj_{part}", normed).flatten(2) for part in "qkv")
        mixed = torch.einsum("bij,bcj->bci", (torch.einsum("bci,bcj->bij", q, k) * len(q[0]) ** -0.5).softmax(-1), v)
        return out + conv(f"{name}.attn.proj", mixed.view_as(out))

    time = linear("time_embedding.timembedding.1", weights["time_embedding.timembedding.0.weight"][t])
    time = linear("time_embedding.timembedding.3", F.silu(time))
    h = conv("head", x)
    skips = [h]
    for number in range(len(MULTS) * (BLOCKS + 1) - 1):
        name = f"downblocks.{number}"
        h = conv(f"{name}.main", h, stride=2) if f"{name}.main.weight" in weights else block(name, h)
        skips.append(h)
    h = block("middleblocks.1", block("middleblocks.0", h))
    for number in range(len(MULTS) * (BLOCKS + 2) - 1):
        name = f"upblocks.{number}"
        if f"{name}.main.weight" in weights:
            h = conv(f"{name}.main", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        else:
            h = block(name, torch.cat((h, skips.pop()), 1))
    return conv("tail.2", F.silu(norm("tail.0", h)))


def write_theirs(path, **more):
    """A file as its main.py saves it."""
    theirs = their_weights()
    state = {"sched": {"last_epoch": 7, "lr_lambdas": [None]}, "optim": {"state": {}, "param_groups": []}, "step": 7}
    torch.save({"net_model": their_weights(seed=1), "ema_model": theirs, "x_T": torch.randn(1), **state, **more}, path)
    return theirs


def loaded(path):
    return build.from_checkpoint(load_checkpoint(path))[0]


def assert_computes(network, theirs):
    x, t = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 333, 999])
    with torch.no_grad():
        expected = their_output(theirs, x, t)
        assert expected.std() > 0.1
        torch.testing.assert_close(network(x, t), expected, rtol=0, atol=1e-5)


def test_its_checkpoint_comes_in_and_is_trained_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = write_theirs("ckpt.pt")
    import_weights("ckpt.pt", "public.pth")
    ours = loaded("public.pth")
    assert_computes(ours.ema_model, theirs)
    torch.testing.assert_close(ours.betas, torch.linspace(1e-4, 0.02, 1000), rtol=1e-6, atol=0)
    assert ours.prediction == "eps"
    run_main("predict.py", "--model_path", "public.pth", "--num_images", "1", "--steps", "2", "--device", "cpu")
    write_pictures(tmp_path / "datasets", 4)
    run_main("txt_annotation.py")
    few = (
        "--input_shape",
        "8,8",
        "--epochs",
        "1",
        "--batch_size",
        "4",
        "--preview_period",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    )
    run_main("train.py", "--start_from", "public.pth", *few, "--init_lr", "1e-12", "--min_lr", "0", "--dropout", "0")
    run = newest_run(tmp_path)
    assert read_file(run / "last.pth")["config"]["time_emb_dim"] == 4 * WIDTH
    assert_computes(loaded(run / "last.pth").model, theirs)


def test_weights_alone_come_in_too(tmp_path):
    torch.save(their_weights(T=500), tmp_path / "bare.pt")
    import_weights(tmp_path / "bare.pt", tmp_path / "public.pth")
    betas = loaded(tmp_path / "public.pth").betas
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 500), rtol=1e-6, atol=0)  # never scaled by 1000/T


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("head.bias"), "1 missing: ema_model.init_conv.bias"),
        (lambda weights: weights.pop("middleblocks.0.attn.proj_k.weight"), "proj_k.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unknown: ema_model.extra"),
        (lambda weights: weights.pop("time_embedding.timembedding.0.weight"), "timembedding.0.weight"),
        (lambda weights: weights.clear(), "timembedding.0.weight"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, change, message):
    theirs = their_weights()
    change(theirs)
    torch.save({"ema_model": theirs}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=f"neither .* nor a checkpoint of w86763777/pytorch-ddpm.*{message}"):
        import_weights(tmp_path / "ckpt.pt", tmp_path / "public.pth")
    assert not (tmp_path / "public.pth").exists()
