"""Timing and compiling: `python -m bench --help`. Only what passed its check is timed; results/ holds what came out."""
