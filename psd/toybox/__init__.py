"""The built-in world: a grammar of simple objects, their exact renderer, and the training of its checkpoints.

Nothing outside this package knows that it exists, apart from configurations that name its path.
"""
