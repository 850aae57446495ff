"""Loss and accuracy of next tokens, by TransformerLens' path."""

from fastlens.tokens import lm_accuracy, lm_cross_entropy_loss

__all__ = ["lm_accuracy", "lm_cross_entropy_loss"]
