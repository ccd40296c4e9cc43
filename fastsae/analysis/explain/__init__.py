"""Automated interpretability: explain features from examples, and score the explanations on text they have not seen."""
