"""Where the halves meet: builds psd's classes from an experiment's settings, and runs them as an objective."""
