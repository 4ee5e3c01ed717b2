"""Muon: orthogonal steps for the weights of convolutions, AdamW for everything else."""
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
        for group in self.param_groups:
            for weights in by_shape(group["params"]):
                self.step_matrices(weights, group["lr"], group["betas"][0], group["weight_decay"])
        return super().step(closure)  # of the weights that have their gradients still

    def step_matrices(self, weights, lr, momentum, weight_decay):
        """One step of weights of one shape. It takes their gradients away."""
        gradients, states = torch.stack([weight.grad for weight in weights]), list(map(self.state_of, weights))
        averages = torch.stack([state["exp_avg"] for state in states]).lerp_(gradients, 1 - momentum)
        matrices = gradients.lerp(averages, momentum).flatten(2)  # (n, out, in*h*w)
        size = ADAM_SIZE * lr * max(matrices.shape[1:]) ** 0.5
        bad = getattr(self, "found_inf", gradients.new_zeros(())) > 0
        for weight, state, average, change in zip(weights, states, averages, orthogonal(matrices)):
            change = change.view_as(weight) * size + weight * (lr * weight_decay)
            weight.sub_(change.masked_fill(bad, 0))
            state["exp_avg"].copy_(torch.where(bad, state["exp_avg"], average))
            state["step"] += ~bad
            weight.grad = None

    def state_of(self, weight):
        """Its number of steps and its momentum, under AdamW's names."""
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


def orthogonal(matrices):
    """About U V' of the matrices U S V', (n, rows, columns): singular values from 0.7 to 1.2.

    Newton and Schulz's iteration X <- (a + b X X' + c (X X')^2) X begins with X / |X|. The factors
    are polynomials of the first X X', which commute: they are multiplied first, as X is larger.
    """
    a, b, c = COEFFICIENTS
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    square, product = x @ x.mT, None
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor
    x = product @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
