"""The precision in which a model, or each part of it, is stored and computed."""
