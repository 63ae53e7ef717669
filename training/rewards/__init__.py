"""Rewards of completions: computed, executed and learned."""
