"""Muon: orthogonal steps for the weights of convolutions, AdamW for everything else."""

from contextlib import contextmanager

import torch

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
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with full_precision():
            for group in self.param_groups:
                for weights in by_shape(group["params"]):
                    self.step_matrices(weights, group["lr"], group["betas"][0], group["weight_decay"])
        super().step()  # of the weights that have their gradients still
        return loss

    def step_matrices(self, weights, lr, momentum, weight_decay):
        """One step of weights of one shape. It uses up their gradients."""
        good = 1 - getattr(self, "found_inf", weights[0].new_zeros(()))  # multiplies all that is added
        matrices = []
        for weight in weights:
            state, gradient = self.state_of(weight), weight.grad.masked_fill_(good == 0, 0)
            ema = state["exp_avg"].lerp_(gradient, good * (1 - momentum))
            state["step"] = state["step"].to(good.device) + good  # a file's is on the CPU
            matrices.append(as_matrix(gradient.lerp_(ema, momentum), weight))
            weight.grad = None
        size = ADAM_SIZE * max(matrices[0].shape) ** 0.5
        for weight, step in zip(weights, orthogonal(torch.stack(matrices), good * lr * size)):
            if weight_decay:
                weight.mul_(1 - good * lr * weight_decay)
            weight.sub_(as_weight(step, weight))

    def state_of(self, weight):
        """The weight's number of steps and the EMA of its gradient, under AdamW's names."""
        if not self.state[weight]:
            self.state[weight] = {"step": weight.new_zeros(()), "exp_avg": torch.zeros_like(weight)}
        return self.state[weight]


def by_shape(parameters):
    """The weights of convolutions that have a gradient, in a list for each shape."""
    shapes = {}
    for parameter in parameters:
        if parameter.ndim == 4 and parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter)
    return shapes.values()


def as_matrix(tensor, weight):
    """(out, in, h, w) -> (out, in*h*w), with the columns in the order of `weight` in memory.

    That saves a copy, and any order will do: U V' has the same.
    """
    return (tensor if weight.is_contiguous() else tensor.permute(0, 2, 3, 1)).reshape(len(tensor), -1)


def as_weight(matrix, weight):
    """The way back from `as_matrix`."""
    channels, height, width = weight.shape[1:]
    contiguous = weight.is_contiguous()
    return matrix.view_as(weight) if contiguous else matrix.view(-1, height, width, channels).permute(0, 3, 1, 2)


@contextmanager
def full_precision():
    """Products of float32 in float32: `orthogonal` amplifies what bf16 would round off."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def orthogonal(matrices, size=1.0):
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
