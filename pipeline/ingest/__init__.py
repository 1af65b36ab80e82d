"""Source -> snapshot. The building half; it never imports torch.

In: a source (folder, table, tars, Parquet) and a configuration. Out: immutable files below ROOT and one commit record.

    source    entries -> references (one Arrow row each) and a reader
    containers  tars and Parquet files -> samples in provisional tars, and their references
    splits    references -> train / val / test, duplicates and groups kept together
    shards    references -> deterministic tar + Arrow index, one pass over the bytes
    stats     per-class counts and bytes; merges associatively
    crew      units on workers that may be lost
    engine    runs units on Ray, pool on processes of this machine; engines chooses
    commit    publishes, or publishes nothing
    run       the rooms above, in order

Guarantees: every entry is in exactly one shard row or one reject row (B1); the same inputs give the same bytes whatever
the number of workers, order or kills (B2); readers see a whole snapshot or none (B4).
"""
