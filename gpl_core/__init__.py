"""The domain of Generative Pseudo-Labeling: importable without a cluster."""
