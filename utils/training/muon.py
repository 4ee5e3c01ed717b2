"""Muon: orthogonal steps for the weights of convolutions, AdamW for everything else."""

import torch
from torch import Tensor

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # a, b, c of Jordan et al. 2024
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
            for shape in {weight.shape: None for weight in convolutions}:
                weights = [weight for weight in convolutions if weight.shape == shape]
                self.step_matrices(weights, group["lr"], group["betas"][0], group["weight_decay"])
        super().step()  # of the weights that still have their gradients

    def step_matrices(self, weights, lr, momentum, weight_decay):
        """One step of weights of one shape. It uses up their gradients."""
        good = 1 - getattr(self, "found_inf", weights[0].new_zeros(()))  # multiplies all that is added
        matrices = []
        for weight in weights:
            state, gradient = self.state[weight], weight.grad.masked_fill_(good == 0, 0)
            if not state:  # AdamW's names
                state.update(step=weight.new_zeros(()), exp_avg=torch.zeros_like(weight))
            ema = state["exp_avg"].lerp_(gradient, good * (1 - momentum))
            state["step"] = state["step"].to(good.device) + good  # a file's is on the CPU
            matrices.append(gradient.lerp_(ema, momentum).flatten(1))
            weight.grad = None
        size = ADAM_SIZE * max(matrices[0].shape) ** 0.5
        for weight, step in zip(weights, orthogonal(torch.stack(matrices), good * lr * size)):
            if weight_decay:
                weight.mul_(1 - good * lr * weight_decay)
            weight.sub_(step.view_as(weight))


def orthogonal(matrices: Tensor, size: float | Tensor = 1.0) -> Tensor:
    """About `size` U V' of the matrices U S V', (n, rows, columns): singular values 0.7 to 1.2.

    Newton and Schulz's iteration X <- (a + b X X' + c (X X')^2) X begins with X / |X|. All factors
    are polynomials of the first X X' and commute. They are multiplied first, as X is larger.
    """
    a, b, c = COEFFICIENTS
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    square, product = x @ x.mT, None
    norm = square.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp_min(1e-7)[:, None, None]
    square = square / norm**2
    for _ in range(ITERATIONS):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor
    x = (product * (size / norm)) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
