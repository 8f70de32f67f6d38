"""Public benchmarks as patches; their archives are the user's own."""
