"""What the scripts share: files, images, devices, settings. The sub-packages are rooms by activity."""
