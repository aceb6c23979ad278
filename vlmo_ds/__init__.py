"""vlmo_ds: pretraining of vision-language mixture-of-modality-experts transformers under DeepSpeed."""

__version__ = "0.2.0"
