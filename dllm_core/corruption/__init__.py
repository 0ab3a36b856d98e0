"""Noise: sources keyed per sample, schedules, and the masks drawn from them."""
