"""The torch half: backbones, exit methods and the reference runner, for the cloud and for training.

Importing this package imports nothing heavy; its modules need torch and transformers
(`pip install 'offramp[torch]'`).
"""
