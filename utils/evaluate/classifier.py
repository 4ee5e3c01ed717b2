"""A small classifier: its features tell how alike sets of pictures are where Inception cannot."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from nets.architecture import check_fit
from utils.checkpoint_contents import Kind, check_tensors, expect, first_not_finite, weights_digest
from utils.errors import UserError
from utils.files import atomic_write
from utils.torch_files import load_tensors

FORMAT = 1
WIDTHS = (32, 64, 128)
STEPS = 1400
RATE = 2e-3  # the highest learning rate


class FeatureNet(nn.Module):
    """Images of 8x8 or more -> features (b, 128): the pixel mean of the last convolution.

    accuracy: on the test images, None until it is known. num_features: for torchmetrics.
    """

    num_features = WIDTHS[-1]

    def __init__(self, img_channels, num_classes):
        super().__init__()
        self.img_channels, self.num_classes, self.accuracy = img_channels, num_classes, None
        channels, layers = img_channels, []
        for width in WIDTHS:  # each halves the size
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images):
        """images (b, c, h, w) uint8, else ValueError -> (b, 128) float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.img_channels:
            raise UserError(
                f"expected uint8 pictures (b, {self.img_channels}, h, w), not {images.dtype} {tuple(images.shape)}"
            )
        return self.layers(images.to(self.head.weight.dtype) / 127.5 - 1).mean((2, 3))

    def classify(self, images):
        """images (b, c, h, w) uint8 -> (b, classes) logits."""
        return self.head(self.forward(images))

    def digest(self):
        """Names these weights: part of the key of whatever is kept of the features."""
        return weights_digest(self.state_dict())


def train_feature_net(
    images, labels, test_images, test_labels, num_classes=None, *, epochs=None, batch_size=128, seed=0, device="cpu"
):
    """A FeatureNet in eval mode, trained on images (n, h, w, c) uint8 with labels (n,).

    A function of its arguments on a machine with a number of threads. Only batches are copied, so
    a memory-mapped cache will do. Adam with one cycle of the learning rate (Smith & Topin 2018).
    epochs: None makes about STEPS steps, at least one epoch: about two minutes on one core for
    60,000 images of 28x28. ValueError for arguments that do not fit together.
    """
    labels, test_labels = torch.as_tensor(labels).long(), torch.as_tensor(test_labels).long()
    check_labelled("training", images, labels)
    check_labelled("test", test_images, test_labels)
    num_classes = num_classes or int(torch.cat((labels, test_labels)).max()) + 1
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the global generator belongs to the caller
        torch.manual_seed(seed)
        net = FeatureNet(images.shape[-1], num_classes).to(device)
    batch_size = min(batch_size, len(labels))
    epochs = epochs or max(1, round(STEPS * batch_size / len(labels)))
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    with tqdm(total=steps, desc="feature net", unit="step", dynamic_ncols=True, leave=False) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
                if len(rows) < batch_size:
                    continue
                batch = shifted(batch_of(images, rows, device), generator)
                loss = F.cross_entropy(net.classify(batch), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    net.eval().requires_grad_(False)
    net.accuracy = accuracy(net, test_images, test_labels, device)
    return net


def check_labelled(name, images, labels):
    """ValueError unless there are pictures (n, h, w, c) uint8, and n labels from 0 up."""
    uint8 = str(images.dtype).endswith("uint8")
    if images.ndim != 4 or not uint8 or len(images) != len(labels) or not len(labels) or labels.min() < 0:
        raise UserError(
            f"{name} pictures must be (n, h, w, c) uint8 with n labels from 0 up, n above 0, "
            f"not {images.dtype} {tuple(images.shape)} with {len(labels)} labels"
        )


def batch_of(images, rows, device):
    """Pictures (n, h, w, c), an array or tensor -> the rows (b, c, h, w) uint8 on the device."""
    return torch.as_tensor(images[rows.numpy()]).to(device).permute(0, 3, 1, 2)


def shifted(images, generator, most=2):
    """The batch, moved by up to `most` pixels with repeated borders: position must not matter."""
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    rows, columns = (rows + down).clamp(0, len(rows) - 1), (columns + right).clamp(0, len(columns) - 1)
    return images[:, :, rows][:, :, :, columns]


@torch.no_grad()
def accuracy(net, images, labels, device):
    """The share of pictures (n, h, w, c) uint8 whose label (n,) the net gives."""
    found = [
        net.classify(batch_of(images, rows, device)).argmax(1).cpu() for rows in torch.arange(len(labels)).split(500)
    ]
    return (torch.cat(found) == labels).sum().item() / len(labels)


def save_feature_net(path, net):
    """Write the net and its accuracy as one file."""
    about = {name: getattr(net, name) for name in ("img_channels", "num_classes", "accuracy")}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"feature_net": FORMAT, **about, "weights": weights}, file)


def load_feature_net(path, device="cpu"):
    """The net of a file that `save_feature_net` wrote, in eval mode. ValueError for others."""
    loaded = load_tensors(path, what="feature net")
    if not isinstance(loaded, dict) or type(loaded.get("feature_net")) is not int or loaded["feature_net"] != FORMAT:
        raise UserError(f"{path}: not a feature net that this version of the project wrote")
    try:
        check_feature_net(loaded)
    except ValueError as error:
        raise UserError(f"{path}: damaged, or edited: {error}") from None
    net = FeatureNet(loaded["img_channels"], loaded["num_classes"])
    net.load_state_dict(loaded["weights"])
    net.accuracy = loaded["accuracy"]
    return net.to(device).eval().requires_grad_(False)


def check_feature_net(loaded):
    """ValueError, before a net is built, unless a file holds one: types, ranges, sizes, shapes."""
    size, share = Kind(int, 1, 2**31), Kind(float, 0, 1)
    accuracy, weights = loaded.get("accuracy", ""), loaded.get("weights")
    for name in ("img_channels", "num_classes"):
        expect(name, size.allows(loaded.get(name)), loaded.get(name), size)
    expect("accuracy", accuracy is None or share.allows(accuracy), accuracy, share)
    check_tensors(weights)
    with torch.device("meta"):  # shapes alone
        check_fit(FeatureNet(loaded["img_channels"], loaded["num_classes"]).state_dict(), weights)
    if (name := first_not_finite(weights)) is not None:
        raise UserError(f"its weights hold NaN or infinity (the first is {name})")
