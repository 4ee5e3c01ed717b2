"""Batches of one size: every image is a function of its seed and its number, not of its batch."""

import torch
from torch.testing import assert_close

from nets import GaussianDiffusion, SamplingOptions, generate_linear_schedule
from utils.sampling.batches import last_images, sample_batches


class Tinted(torch.nn.Module):
    """A network whose output depends on x, t and the class."""

    def forward(self, x, t, y):
        return 0.3 * x + (0.1 * y + 0.01 * t)[:, None, None, None]


LABELS = torch.tensor([2, 0, 1, 1])


def sampled(firsts, batch_size, **settings):
    """{first: the batch's images}."""
    diffusion = GaussianDiffusion(Tinted(), (4, 6), 3, num_classes=3, betas=generate_linear_schedule(20, 0.005, 0.5))
    batches = sample_batches(diffusion, firsts, batch_size, 7, LABELS, options=SamplingOptions("ddpm"), **settings)
    return diffusion, {first: last_images(steps) for first, steps in batches}


def test_an_image_has_its_own_seed_and_its_label_in_turn():
    diffusion, found = sampled([3, 0], 3)
    assert list(found) == [3, 0]
    for first, labels in ((0, [2, 0, 1]), (3, [1, 2, 0])):
        seeds = [7 + first, 8 + first, 9 + first]
        assert torch.equal(found[first], diffusion.sample(3, "cpu", torch.tensor(labels), seeds=seeds, sampler="ddpm"))
    _, other = sampled([0], 6)
    assert_close(other[0], torch.cat((found[0], found[3])))


def test_given_noise_takes_the_place_of_the_seeds():
    asked = []

    def noise(numbers):
        asked.append(numbers.tolist())
        while True:
            yield torch.zeros(2, 3, 4, 6)

    _, found = sampled([0, 4], 2, noise=noise)
    assert asked == [[0, 1], [4, 5]]
    assert torch.equal(found[0], found[4])  # the noise and the labels are the same
