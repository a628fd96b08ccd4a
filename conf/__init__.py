"""Hydra groups; installed as attention_zoo.conf."""
