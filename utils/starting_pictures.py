"""What a drawing can start from besides noise of one seed: a picture, a masked picture, the way between two noises."""
import torch

from utils.images import describe_error, load_image


def load_picture(path, input_shape, img_channels):
    """A picture file, converted as the training pictures are: (1, C, H, W) float32 in [-1, 1]. ValueError where it cannot be read."""
    return _load(path, input_shape, img_channels) / 127.5 - 1


def load_mask(path, input_shape):
    """A mask, (1, 1, H, W): 1. where it is lighter than mid-grey (drawn anew), else 0. (kept). ValueError for an empty or full one."""
    mask = (_load(path, input_shape, 1) > 127.5).float()
    if mask.min() == mask.max():
        raise ValueError(f"{path}: the mask is all {'white' if mask.max() else 'black'}: paint white what is drawn anew, black what stays")
    return mask


def _load(path, input_shape, img_channels):
    try:
        pixels = load_image(path, input_shape, img_channels)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a picture ({describe_error(error)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float()


def slerp(a, b, share):
    """The point at `share` (0 ... 1) of the great circle from noise a to noise b, of the same shape (Shoemake 1985).

    Between them the length stays that of Gaussian noise; on the straight line it would shrink, and the pictures turn grey.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
