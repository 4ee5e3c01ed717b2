"""A small classifier: its features tell how alike image sets are where Inception cannot."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils.checkpoint.integrity import check_tensors, first_not_finite, load_tensors, save_tensors
from utils.errors import UserError, one_line

FORMAT, MAX_CHANNELS, MAX_CLASSES = 1, 4, 100_000  # a file that claims more must not build a network of any size
WIDTHS = (32, 64, 128)
STEPS, RATE = 1400, 2e-3  # the highest learning rate


class FeatureNet(nn.Module):
    """Convolutions that halve the size three times; the features are the last ones' mean."""

    num_features = WIDTHS[-1]
    accuracy: float | None = None  # on test images

    def __init__(self, img_channels, num_classes):
        super().__init__()
        self.img_channels, self.num_classes = img_channels, num_classes
        layers = []
        for channels, width in zip((img_channels, *WIDTHS), WIDTHS):  # each halves the size
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images):
        """Images (b, c, h, w) uint8, 8x8 or more -> features (b, 128) float32."""
        return self.layers(images.to(self.head.weight.dtype) / 127.5 - 1).mean((2, 3))


def train_feature_net(training, test, num_classes, *, epochs=None, batch_size=128, seed=0, device="cpu"):
    """A FeatureNet in eval mode. training, test: images (n, h, w, c) uint8 and labels (n,)."""
    images, labels = training
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the global generator belongs to the caller
        torch.manual_seed(seed)
        net = FeatureNet(images.shape[-1], num_classes).to(device)
    batch_size = min(batch_size, len(labels))
    steps_per_epoch = len(labels) // batch_size
    epochs = epochs or max(1, round(STEPS * batch_size / len(labels)))
    optimizer = torch.optim.Adam(net.parameters(), RATE)  # with one cycle of the rate (Smith & Topin 2018)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps_per_epoch + 1)
    for _ in tqdm(range(epochs), desc="feature net", unit="epoch", dynamic_ncols=True, leave=False):
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size)[:steps_per_epoch]:
            batch = shift_randomly(images[rows].to(device).permute(0, 3, 1, 2), generator)
            loss = F.cross_entropy(net.head(net(batch)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval().requires_grad_(False)
    parts = test[0].permute(0, 3, 1, 2).split(500)
    found = torch.cat([net.head(net(part.to(device))).argmax(1).cpu() for part in parts])
    net.accuracy = round((found == test[1]).double().mean().item(), 4)
    return net


def shift_randomly(images, generator):
    """The batch, moved by up to 2 pixels with repeated borders: position must not matter."""
    for dim, shift in zip((2, 3), torch.randint(-2, 3, (2,), generator=generator).tolist()):
        rows = (torch.arange(images.shape[dim]) + shift).clamp(0, images.shape[dim] - 1)
        images = images.index_select(dim, rows.to(images.device))
    return images


def save_feature_net(path, net):
    about = {name: getattr(net, name) for name in ("img_channels", "num_classes", "accuracy")}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    save_tensors(path, {"feature_net": FORMAT, **about, "weights": weights})


def load_feature_net(path, device="cpu"):
    """The net of a file that `save_feature_net` wrote, in eval mode. UserError for others."""
    loaded = load_tensors(path, what="feature net")
    try:
        channels, classes = loaded["img_channels"], loaded["num_classes"]
        if loaded["feature_net"] != FORMAT or not (channels <= MAX_CHANNELS and classes <= MAX_CLASSES):
            raise UserError("of another version, or too large")
        net = FeatureNet(channels, classes)
        net.accuracy = None if loaded["accuracy"] is None else float(loaded["accuracy"])
        check_tensors(loaded["weights"])
        net.load_state_dict(loaded["weights"])
        if first_not_finite(loaded["weights"]) is not None:
            raise UserError("its weights hold NaN or infinity")
    except Exception as error:  # values of any kind end in errors of any kind
        raise UserError(f"{path}: no feature net of this version, or a damaged one ({one_line(error, 400)})") from None
    return net.to(device).eval().requires_grad_(False)
