"""The domain of Generative Pseudo-Labeling: importable without a cluster."""

__version__ = "0.1.0"
