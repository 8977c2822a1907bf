"""assay: a laboratory for language-model architectures."""

__version__ = "0.1.0"
