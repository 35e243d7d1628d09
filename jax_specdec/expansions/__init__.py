"""Wider drafts from any drafter of chains."""
