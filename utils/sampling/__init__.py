"""New images: equal batches with a seed for each image, starting images, the files of predict.py.

predict.py, training and evaluate may import from it.
"""
