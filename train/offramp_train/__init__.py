"""Training, calibration and evaluation of multi-exit models.

Importing this package imports nothing heavy; its modules need torch and transformers
(`pip install 'offramp[train]'`).
"""
