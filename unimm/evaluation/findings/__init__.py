"""The papers' findings on small data: cells to train and measure, and whether each claim's direction holds."""
