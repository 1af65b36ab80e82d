"""Ray job entry points: parse, call, exit code."""
