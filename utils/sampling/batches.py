"""Batches of new pictures."""




def advice_for_drawing(config):
    """Drawing keeps nothing between the network's calls: what is needed falls with the pictures drawn at once."""
    if config.batch_size == 1:
        return "one picture at a time is too much: lower --input_shape, or draw with a smaller network"
    return f"{config.batch_size} pictures at a time are too many; --batch_size {config.batch_size // 2} needs about half"
