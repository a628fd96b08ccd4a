"""Attention of hashed tokens: hash, sort, attend inside chunks."""
