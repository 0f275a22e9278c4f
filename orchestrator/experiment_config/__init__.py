"""What one optimisation is made of, as plain frozen dataclasses: the schema of `experiment` files.

A module for each part; ``experiment.py`` has the whole. The classes of ``psd`` are built from these in
``psd_objective`` by ``match`` on the config's type; nothing here imports torch. A setting that a file leaves out has
the default that stands here; docs/sweep-files.md explains each.
"""
