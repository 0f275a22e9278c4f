"""The training of the built-in checkpoints: ``python -m psd.toybox.train``."""
