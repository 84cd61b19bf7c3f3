"""The precision that a model, or each part of it, computes and is stored in."""
