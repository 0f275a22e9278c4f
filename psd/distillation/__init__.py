"""Score distillation: every method is a residual and a weighting (see ``residuals`` and ``weightings``)."""
