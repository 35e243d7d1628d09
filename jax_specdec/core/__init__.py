"""The decoding core: drafts, caches, noise, acceptance and the loop. It imports nothing above it."""
