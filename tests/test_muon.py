"""Muon: its steps are orthogonal, a bad gradient changes nothing, and its runs resume."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_state, read_file, run_main
from torch.utils._python_dispatch import TorchDispatchMode

from nets import UNet
from utils.checkpoint.integrity import save_tensors
from utils.training.muon import ADAM_SIZE, Muon, orthogonal
from utils.training.optimizer import make_optimizer, restore_optimizer, step_unless_bad

NETWORK = {
    "img_channels": 3,
    "base_channels": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "time_emb_dim": 16,
    "num_groups": 2,
    "num_classes": 3,
    "attention_resolutions": (1,),
}


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 9), (64, 576)])
def test_singular_values_become_those_of_the_iterated_polynomial(shape):
    """By singular values and the scalar polynomial, in float64."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    matrices[1] *= 100
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    (found,) = orthogonal([matrices], max(shape) ** -0.5)
    torch.testing.assert_close(found.double(), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-3)
    assert 0.65 < s.min() <= s.max() < 1.25


def test_no_gradient_is_no_step():
    assert not orthogonal([torch.zeros(2, 3, 4)])[0].any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 or newer")
def test_matrices_as_pytorchs_own():
    """1x1 convolutions: PyTorch takes matrices alone. It computes in bf16."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 10, generator=generator)
    one, other = (torch.nn.Parameter(start.clone().view(shape)) for shape in ((6, 10, 1, 1), (6, 10)))
    ours = Muon([one], lr=0.1, weight_decay=0.1, fused=True)
    theirs = torch.optim.Muon([other], lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        other.grad = torch.randn(6, 10, generator=generator)
        one.grad = other.grad.clone().view_as(one)
        ours.step()
        theirs.step()
    assert (other - start).norm() > 0.3
    torch.testing.assert_close(one.view_as(other), other, rtol=0, atol=0.02)


def test_everything_else_is_adamws_and_steps_are_of_adams_size():
    torch.manual_seed(0)
    network, twin = UNet(**NETWORK), UNet(**NETWORK)
    twin.load_state_dict(network.state_dict())
    ours = make_optimizer("muon", network.parameters(), torch.device("cpu"))
    theirs = make_optimizer("adamw", twin.parameters(), torch.device("cpu"))
    for seed in range(3):
        for optimizer, trained in ((ours, network), (theirs, twin)):
            gradients(trained, seed)
            optimizer.param_groups[0]["lr"] = 0.01 if seed == 2 else 0.0
            if seed == 2 and trained is network:
                start = {name: value.clone() for name, value in network.state_dict().items()}
            optimizer.step()
            optimizer.zero_grad()
    convolutions = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    for name, value in network.state_dict().items():
        if name not in convolutions:
            torch.testing.assert_close(value, twin.state_dict()[name], rtol=0, atol=0)
            continue
        step = (value - start[name]).flatten(1)
        rank = torch.linalg.matrix_rank(step)
        expected = ADAM_SIZE * 0.01 * max(step.shape) ** 0.5
        assert rank == min(step.shape), name
        assert 0.6 * expected < torch.linalg.matrix_norm(step, 2) < 1.3 * expected, name


def test_the_order_in_memory_changes_nothing_but_rounding():
    """Also where gradients lie in another order than the weights."""

    def flat(network):
        return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])

    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = UNet(**NETWORK).to(memory_format=layout)
        before = flat(network)
        optimizer = make_optimizer("muon", network.parameters(), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 0.01
        for seed in range(2):
            gradients(network, seed)
            optimizer.step()
        results.append(flat(network) - before)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert results[0].abs().max() > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_together_step_as_each_alone(layout):
    """Up to rounding, of shapes that share a square of their own or a padded one, or nothing."""
    shapes = [
        (40, 3, 3, 3),
        (3, 40, 3, 3),
        (40, 24, 1, 1),
        (24, 40, 1, 1),
        (24, 80, 1, 1),
        (40, 3, 3, 3),
        (96, 8, 3, 3),
    ]
    generator, results = torch.Generator().manual_seed(0), []
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    for together in (True, False):
        weights = [torch.nn.Parameter(value.clone(memory_format=layout)) for value in start]
        parts = [weights] if together else [[weight] for weight in weights]
        optimizers = [Muon(part, lr=0.01, weight_decay=0.1, fused=True) for part in parts]
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()  # where AMP or a scaler made it, in another order than the weight
            for optimizer in optimizers:
                optimizer.step()
        state = [optimizer.state[weight] for optimizer in optimizers for weight in optimizer.param_groups[0]["params"]]
        results.append([*weights, *(values["exp_avg"] for values in state), *(values["step"] for values in state)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    assert all((weight - value).abs().max() > 0.01 for weight, value in zip(results[0], start))


class Operations(TorchDispatchMode):
    """Counts what launches a kernel on a GPU: all but views and new, empty tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = ("as_strided", "detach", "empty_like", "permute", "split", "transpose", "view", "slice", "expand")
        self.count += not any(word in str(function) for word in views)
        return function(*args, **kwargs or {})


def test_the_operations_of_a_step_do_not_grow_with_the_number_of_weights():
    """By the shapes: three more for each other one."""
    counts = []
    for shapes in ([(8, 8, 3, 3)] * 2, [(8, 8, 3, 3)] * 9, [(8, 8, 3, 3), (8, 16, 3, 3), (16, 8, 1, 1)] * 3):
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = Muon(weights, lr=0.01, weight_decay=0.1, fused=True)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            with Operations() as operations:
                optimizer.step()
        counts.append(operations.count)
    assert counts[0] == counts[1] and counts[2] <= counts[0] + 2 * 3


def test_weight_decay_alone_shrinks_by_the_learning_rate():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    start = weight.detach().clone()
    optimizer = make_optimizer("muon", [weight], torch.device("cpu"), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.2
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start * (1 - 0.2 * 0.1), rtol=0, atol=1e-7)


def test_with_a_gradient_scaler():
    """A step that overflowed in fp16 is left out; the next one is that of the plain gradients."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        network = UNet(**NETWORK)
        optimizer = make_optimizer("muon", network.parameters(), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = 0.01
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
        scaler.scale(torch.zeros(1))  # makes its tensor
        for bad in (True, False) if scaled else (False,):
            gradients(network, 0)
            for parameter in network.parameters():
                parameter.grad *= (float("inf") if bad else 4.0) if scaled else 1.0
            scaler.unscale_(optimizer)
            step_unless_bad(optimizer, scaler, torch.tensor(float(bad)))
            scaler.update(4.0)
        results.append([parameter.detach() for parameter in network.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_without_a_fused_step_the_state_lies_beside_the_weights():
    """As on MPS: a file's step counts begin on the CPU."""
    weight = torch.nn.Parameter(torch.randn(2, 3, 3, 3, device="meta"))
    optimizer = Muon([weight], lr=0.1, fused=False)
    state = {"step": torch.ones(()), "exp_avg": torch.zeros(2, 3, 3, 3)}
    restore_optimizer(optimizer, {"state": {0: state}})
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert {value.device.type for value in optimizer.state[weight].values()} == {"meta"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_bad_gradient_changes_nothing(layout):
    torch.manual_seed(0)
    network = UNet(**NETWORK).to(memory_format=layout)
    optimizer = make_optimizer("muon", network.parameters(), torch.device("cpu"), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    gradients(network, 0)
    optimizer.step()
    before = [value.clone() for value in network.parameters()]
    moments = {
        number: {name: value.clone() for name, value in state.items()}
        for number, state in optimizer.state_dict()["state"].items()
    }
    assert {state["step"].item() for state in moments.values()} == {1}
    gradients(network, 1)
    for number, parameter in enumerate(network.parameters()):
        parameter.grad.fill_(float("nan") if number % 2 else float("inf"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for value, was in zip(network.parameters(), before, strict=True):
        assert torch.equal(value, was)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in state.items())


RUN = [*TINY, "--class_conditional", "True", "--optimizer_type", "muon"]


def last(folder):
    return next(Path(folder).glob("*/last.pth"))


@pytest.mark.parametrize("settings", [["--weight_decay", "0.01"], ["--preset", "quick"], ["--preset", "small"]])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(workplace, settings):
    constant = [*RUN, *settings, "--init_lr", "1e-3", "--min_lr", "1e-3", "--warmup", "0"]
    run_main("train.py", *constant, "--epochs", "4", "--save_dir", "whole")
    run_main("train.py", *constant, "--epochs", "2", "--save_dir", "broken")
    run_main("train.py", "--resume", "latest", "--epochs", "4", "--save_dir", "broken")
    assert_same_state(*(read_file(last(folder)) for folder in ("whole", "broken")))


@pytest.mark.parametrize("kinds", [("adam", "muon"), ("muon", "adamw")])
def test_another_optimizer_begins_with_moments_of_its_own(workplace, capsys, kinds):
    run_main("train.py", *RUN, "--epochs", "1", "--optimizer_type", kinds[0])
    run_main("train.py", "--resume", "latest", "--epochs", "3", "--optimizer_type", kinds[1])
    assert f"the optimizer is now {kinds[1]}: its state was reset" in capsys.readouterr().out
    run_main("train.py", "--resume", "latest", "--epochs", "4")
    assert "was reset" not in capsys.readouterr().out
    checkpoint = read_file(last("logs"))
    assert checkpoint["config"]["optimizer_type"] == kinds[1] and checkpoint["position"]["epoch"] == 4
    kept = {frozenset(state) for state in checkpoint["optimizer"]["state"].values()}
    adams = frozenset(("step", "exp_avg", "exp_avg_sq"))
    assert kept == ({adams, frozenset(("step", "exp_avg"))} if kinds[1] == "muon" else {adams})


def test_moments_of_another_optimizer_than_the_settings_name_are_refused(workplace, capsys):
    run_main("train.py", *RUN, "--epochs", "1")
    checkpoint = read_file(last("logs"))
    checkpoint["config"]["optimizer_type"] = "adam"
    save_tensors("edited.pth", checkpoint)
    with pytest.raises(SystemExit) as end:
        run_main("train.py", "--resume", "edited.pth", "--epochs", "2")
    assert end.value.code == 1 and "optimizer, sums and scaler do not fit its weights" in capsys.readouterr().err
