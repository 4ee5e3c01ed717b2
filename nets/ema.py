"""The exponential moving average (EMA) of the weights. No operation waits for a GPU."""

import torch
from torch import Tensor, nn


def ema_weight(n: Tensor, decay: float, warmup: bool) -> Tensor:
    """The weight of the network in the n-th EMA update, a 0-dim float32 tensor on n's device.

    n: 0-dim int64; below 0 the EMA is a copy of the network. decay: the largest share that the EMA
    keeps. warmup: it keeps at most (1 + n) / (10 + n).
    """
    decay = torch.full_like(n, decay, dtype=torch.float32)
    if warmup:  # a short run must not keep its first weights
        decay = torch.minimum(decay, (1 + n) / (10 + n))
    return torch.where(n < 0, 1.0, 1 - decay)


def update_(ema_model: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """ema_model += weight (model - ema_model), in place. weight: 0-dim, exact for 0 and 1."""
    averages, values = list(ema_model.parameters()), [parameter.detach() for parameter in model.parameters()]
    if weight.device.type != "cpu":  # reading the weight would wait for the GPU: two passes instead
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, torch._foreach_mul(values, weight))
    elif weight > 0:
        torch._foreach_lerp_(averages, values, weight.item())
    for average, buffer in zip(ema_model.buffers(), model.buffers()):  # statistics of batch norm
        average.copy_(torch.where(weight > 0, buffer, average))
