"""Between text and tokens: prompts, stop strings, detokenisation."""
