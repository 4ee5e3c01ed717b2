"""What scripts share: files, images, devices, settings. Each sub-package serves one activity."""
