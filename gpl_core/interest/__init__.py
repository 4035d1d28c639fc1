"""The interest model: SID vocabulary, language model, shared-prefix beam search."""
