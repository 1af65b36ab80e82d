"""The only birth of randomness: keyed hashes and keyed permutations (DESIGN.md, section 8). Being written."""
