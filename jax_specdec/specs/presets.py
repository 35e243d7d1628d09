"""Published cascades by name (arXiv 2312.11462, appendix B)."""

# The settings of arXiv 2312.11462, appendix B. `lm2` is the smaller drafter.
PRESETS = {
    "csd-vicuna": "cascade(lm[max-gram:10]:2, max-gram:10)",
    "csd-vicuna-tree": "cascade(lm[max-gram:1]:1, max-gram:3)+fixed:20",
    "csd-flan-2level": "cascade(lm[max-gram:10]:10, max-gram:10)",
    "csd-flan-3level": (
        "cascade(lm[lm2[max-gram:10]:1, max-gram:10; lenience=3]:8, lm2[max-gram:10]:5, max-gram:10)"
    ),
    "csd-flan-3level-mmlu": (
        "cascade(lm[lm2[max-gram:10]:1, max-gram:10; lenience=5]:5, lm2[max-gram:10]:14, max-gram:10)"
    ),
}
