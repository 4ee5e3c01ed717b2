"""Adam and AdamW, and a step that a gradient gone bad cannot reach."""
import torch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(name, parameters, device, momentum=0.9, weight_decay=0.0):
    """A fused Adam or AdamW. momentum is its beta 1. The rate is set by `set_rate` before each step."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer_type {name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    fused = device.type in ("cpu", "cuda")
    return OPTIMIZERS[name](parameters, lr=0.0, betas=(momentum, 0.999), weight_decay=weight_decay, fused=fused)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def restore_optimizer(optimizer, saved):
    """The moments of a saved state under this run's own settings (a new weight decay on the command line holds)."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # In the weights' own memory layout, which the run may have saved otherwise: the fused step goes by addresses.
                state[name] = torch.empty_like(parameter).copy_(value)


def step_unless_bad(optimizer, scaler, bad):
    """One update that leaves weights, moments and step counts alone where `bad` (0-dim tensor, 0. or 1.) is 1.

    The fused optimizers read the flag on the device, so the host does not wait for it; elsewhere it must look.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad  # an enabled GradScaler puts its own, equal one there
        scaler.step(optimizer)
    elif not bad:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def held_against(bad, scaler):
    """`bad`, but 0 while a GradScaler still halves its factor: an overflow there is its way to find the largest that fits."""
    if not scaler.is_enabled():
        return bad
    # The scale as a tensor on the device; scaler.get_scale() would make the host wait.
    return bad * (scaler._scale <= 1)
