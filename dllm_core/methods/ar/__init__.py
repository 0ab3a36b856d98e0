"""The autoregressive reference: the model as it was (`ar`), or fine-tuned on the same data (`ar_tuned`)."""
