"""The exponential moving average (EMA) of the weights. No operation waits for a GPU."""

import torch
from torch import Tensor, nn

Tensors = tuple[list[Tensor], list[Tensor]]  # parameters and buffers of a network


def ema_weight(n: Tensor, decay: float, warmup: bool) -> Tensor:
    """The weight of the network in the n-th EMA update, a 0-dim float32 tensor on n's device.

    n: 0-dim int64; below 0 the EMA is a copy of the network. decay: the largest share that the EMA
    keeps. warmup: it keeps at most (1 + n) / (10 + n).
    """
    decay = torch.full_like(n, decay, dtype=torch.float32)
    if warmup:  # a short run must not keep its first weights
        decay = torch.minimum(decay, (1 + n) / (10 + n))
    return torch.where(n < 0, 1.0, 1 - decay)


def tensors_of(network: nn.Module) -> Tensors:
    """For `update_`. Listing them takes as long as updating: it is done once."""
    return list(network.parameters()), list(network.buffers())


@torch.no_grad()
def update_(averages: Tensors, values: Tensors, weight: Tensor) -> None:
    """averages += weight (values - averages), in place. weight: 0-dim, exact for 0 and 1."""
    (averages, average_buffers), (values, buffers) = averages, values
    if weight.device.type != "cpu":  # reading the weight would wait for the GPU: two passes instead
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, torch._foreach_mul(values, weight))
    elif weight > 0:
        torch._foreach_lerp_(averages, values, weight.item())
    for average, buffer in zip(average_buffers, buffers):  # statistics of batch norm
        average.copy_(torch.where(weight > 0, buffer, average))
