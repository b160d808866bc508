"""Arithmetic of single layers: precision, norms, LoRA, quantized products, vocabulary head."""
