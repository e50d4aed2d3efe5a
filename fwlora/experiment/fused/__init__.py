"""Encoders computed by a fused path: the same logits and gradients in fewer operations."""
