"""Codecs fitted to one bundle and one depth: what tokens to keep, how to pool them, fewer channels.

A fit needs text, not labels: what it learns from is the uncut model itself.
"""
