"""A small classifier: its features tell how alike image sets are where Inception cannot."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoint_contents import check_tensors, first_not_finite
from utils.errors import UserError, one_line
from utils.files import atomic_write
from utils.torch_files import load_tensors

FORMAT = 1
# Of what a file claims: a damaged or hostile one must not build a network of any size.
LIMITS = {"feature_net": (FORMAT, FORMAT), "img_channels": (1, 4), "num_classes": (1, 100_000)}
WIDTHS = (32, 64, 128)
STEPS = 1400
RATE = 2e-3  # the highest learning rate


class FeatureNet(nn.Module):
    """Images of 8x8 or more -> features (b, 128): the pixel mean of the last convolution."""

    num_features = WIDTHS[-1]  # torchmetrics asks for it
    accuracy: float | None = None  # on test images

    def __init__(self, img_channels: int, num_classes: int):
        super().__init__()
        self.img_channels, self.num_classes = img_channels, num_classes
        layers = []
        for channels, width in zip((img_channels, *WIDTHS), WIDTHS):  # each halves the size
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images (b, c, h, w) uint8 -> (b, 128) float32."""
        if images.dtype != torch.uint8:
            raise UserError(f"expected uint8 images (b, {self.img_channels}, h, w), not {images.dtype}")
        return self.layers(images.to(self.head.weight.dtype) / 127.5 - 1).mean((2, 3))

    def classify(self, images: Tensor) -> Tensor:
        """images (b, c, h, w) uint8 -> (b, classes) logits."""
        return self.head(self.forward(images))


def train_feature_net(
    images, labels, test_images, test_labels, num_classes=None, *, epochs=None, batch_size=128, seed=0, device="cpu"
) -> FeatureNet:
    """A FeatureNet in eval mode, trained on images (n, h, w, c) uint8 with labels (n,).

    A function of its arguments on a machine with a number of threads. Adam with one cycle of the
    learning rate (Smith & Topin 2018). epochs: None makes about STEPS steps, at least one epoch:
    about two minutes on one core for 60,000 images of 28x28.
    """
    labels, test_labels = (torch.as_tensor(values).long() for values in (labels, test_labels))
    assert len(images) == len(labels) and len(test_images) == len(test_labels)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the global generator belongs to the caller
        torch.manual_seed(seed)
        net = FeatureNet(images.shape[-1], num_classes or int(torch.cat((labels, test_labels)).max()) + 1).to(device)
    batch_size = min(batch_size, len(labels))
    steps_per_epoch = len(labels) // batch_size
    epochs = epochs or max(1, round(STEPS * batch_size / len(labels)))
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps_per_epoch + 1)
    with tqdm(total=epochs * steps_per_epoch, desc="feature net", unit="step", dynamic_ncols=True, leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(batch_size)[:steps_per_epoch]:
                batch = shift_randomly(batch_of(images, rows, device), generator)
                loss = F.cross_entropy(net.classify(batch), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    net.eval().requires_grad_(False)
    batches = torch.arange(len(test_labels)).split(500)
    found = torch.cat([net.classify(batch_of(test_images, rows, device)).argmax(1).cpu() for rows in batches])
    net.accuracy = (found == test_labels).double().mean().item()
    return net


def batch_of(images, rows: Tensor, device) -> Tensor:
    """Images (n, h, w, c), an array or tensor -> the rows (b, c, h, w) uint8 on the device."""
    return torch.as_tensor(images[rows.numpy()]).to(device).permute(0, 3, 1, 2)


def shift_randomly(images: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """The batch, moved by up to `most` pixels with repeated borders: position must not matter."""
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) + right).clamp(0, width - 1)
    return images[:, :, rows][:, :, :, columns]


def save_feature_net(path, net: FeatureNet) -> None:
    """Write the net and its accuracy as one file."""
    about = {name: getattr(net, name) for name in ("img_channels", "num_classes", "accuracy")}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"feature_net": FORMAT, **about, "weights": weights}, file)


def load_feature_net(path, device="cpu") -> FeatureNet:
    """The net of a file that `save_feature_net` wrote, in eval mode. UserError for others."""
    loaded = load_tensors(path, what="feature net")
    try:
        for name, (lowest, highest) in LIMITS.items():
            if not lowest <= loaded[name] <= highest:
                raise UserError(f"{name} is out of range")
        net = FeatureNet(loaded["img_channels"], loaded["num_classes"])
        net.accuracy = None if loaded["accuracy"] is None else float(loaded["accuracy"])
        check_tensors(loaded["weights"])
        net.load_state_dict(dict(loaded["weights"]))
        if (name := first_not_finite(loaded["weights"])) is not None:
            raise UserError(f"{name} holds NaN or infinity")
    except Exception as error:  # values of any kind end in errors of any kind
        reason = f"{type(error).__name__}: {one_line(error, 400)}"
        raise UserError(f"{path}: no feature net of this version of the project, or a damaged one ({reason})") from None
    return net.to(device).eval().requires_grad_(False)
