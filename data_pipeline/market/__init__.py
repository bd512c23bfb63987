"""The synthetic ad market: its world, traffic, auction, logging policy and truth; data_pipeline/synthetic.py runs it."""
