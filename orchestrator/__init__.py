"""Sweeps over any resumable objective: Ray actors execute runs, Optuna decides what to try, W&B shows them."""
