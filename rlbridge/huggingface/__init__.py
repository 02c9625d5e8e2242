"""What trainers of transformers models share: their checkpoint's tensors, where these lie, and the directory on disk.

For plugins to import; the core itself does not.
"""
