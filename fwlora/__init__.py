"""Fisher-Weighted LoRA: LoRA whose updates shrink where the frozen weights receive little gradient."""

__version__ = "0.1.0"
