"""Muon: orthogonal steps for the weights of convolutions, AdamW for everything else."""

from collections import Counter
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # a, b, c of Jordan et al. 2024
SIDE = 32  # sides of squares are multiples of it
ADAM_SIZE = 0.2  # the root mean square of Adam's steps (Liu et al. 2025)


class Muon(torch.optim.AdamW):
    """Muon for the weights of convolutions, (out, in, h, w), as matrices (out, in*h*w).

    Where the gradient's EMA, with Nesterov's step ahead, is U S V', the step is U V' (Jordan et al.
    2024), scaled to the size of Adam's: all weights share a learning rate (Liu et al. 2025, arXiv
    2502.16982), beta 1 and the decoupled weight decay. As in the fused AdamW nothing changes where
    `found_inf` is 1, and the host does not wait for the device.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            convolutions = [weight for weight in group["params"] if weight.ndim == 4 and weight.grad is not None]
            if convolutions:
                self.step_matrices(convolutions, group["lr"], group["betas"][0], group["weight_decay"])
        super().step()  # of the weights that still have their gradients

    def step_matrices(self, weights, lr, momentum, weight_decay):
        """One step of the weights, all together: few launches. It uses up their gradients."""
        good = 1 - getattr(self, "found_inf", weights[0].new_zeros(()))  # multiplies all that is added
        weights = sorted(weights, key=lambda weight: (min(weight.shape[0], weight.shape[1:].numel()), weight.shape))
        shapes = Counter(weight.shape for weight in weights)
        states = [self.state[weight] for weight in weights]
        for weight, state in zip(weights, states):
            if not state:  # AdamW's names
                state.update(step=weight.new_zeros(()), exp_avg=torch.zeros_like(weight))
            state["step"] = state["step"].to(good.device)  # a file's is on the CPU
        steps, emas = ([state[name] for state in states] for name in ("step", "exp_avg"))

        flat = torch.cat([in_memory_order(weight.grad, weight) for weight in weights]).masked_fill_(good == 0, 0)
        parts = flat.split([weight.numel() for weight in weights])
        changes = [part.as_strided(weight.shape, weight.stride()) for part, weight in zip(parts, weights)]
        stacks = flat.split([count * shape.numel() for shape, count in shapes.items()])
        stacks = [stack.view(count, shape[0], -1) for stack, (shape, count) in zip(stacks, shapes.items())]
        for weight in weights:
            weight.grad = None

        torch._foreach_add_(steps, [good] * len(steps))  # a tensor alone would be read by the host
        differences = torch._foreach_sub(changes, emas)
        torch._foreach_mul_(differences, good * (1 - momentum))
        torch._foreach_add_(emas, differences)
        torch._foreach_lerp_(changes, emas, momentum)
        torch._foreach_copy_(stacks, orthogonal(stacks, good * lr * ADAM_SIZE))
        if weight_decay:
            torch._foreach_mul_(weights, 1 - good * lr * weight_decay)
        torch._foreach_sub_(weights, changes)


def in_memory_order(gradient: Tensor, weight: Tensor) -> Tensor:
    """The numbers of `gradient`, (out*in*h*w,), as those of `weight` lie in memory."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return (gradient.permute(0, 2, 3, 1) if channels_last else gradient).flatten()


def orthogonal(stacks: list[Tensor], size: float | Tensor = 1.0) -> list[Tensor]:
    """About U V' of the matrices U S V' in each stack (n, rows, columns), scaled to one size.

    size: the root mean square of the results; singular values are 0.7 to 1.2 before that. Stacks
    next to each other whose squares X X' have one size take the launches of one. Zeros around a
    square change nothing.
    """
    squares = [x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x for x in stacks]
    sides, products = [square.shape[1] for square in squares], []
    padded = [F.pad(square, (0, -side % SIDE) * 2) if side % SIDE else square for side, square in zip(sides, squares)]
    for _, group in groupby(padded, key=lambda square: square.shape[1]):
        group = list(group)
        products += newton_schulz(torch.cat(group), size).split([len(square) for square in group])
    torch._foreach_mul_(products, [max(x.shape[1:]) ** 0.5 for x in stacks])
    products = [product[:, :side, :side] for side, product in zip(sides, products)]
    return [product @ x if x.shape[1] <= x.shape[2] else x @ product for product, x in zip(products, stacks)]


def newton_schulz(square: Tensor, size: float | Tensor) -> Tensor:
    """P of X X' (n, rows, rows), so that P X is about `size` U V' of X = U S V'.

    Newton and Schulz's iteration X <- (a + b X X' + c (X X')^2) X begins with X / |X|. All factors
    are polynomials of the first X X' and commute. They are multiplied first, as X is larger.
    """
    a, b, c = COEFFICIENTS
    product, norm = None, square.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp_min(1e-7)[:, None, None]
    square = square / norm**2
    for remaining in reversed(range(ITERATIONS)):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor if remaining else None
    return product * (size / norm)
