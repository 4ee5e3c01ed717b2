"""New images: equal batches with a seed an image, images to start from, and the files that predict.py writes."""
