"""Prove a snapshot: what is on storage is what the record says, and what the promises say.

Comes in: a ROOT, a snapshot number. Goes out: a ``Verification``: every contradiction as a ``Finding`` that says what
was expected, what was found, and what to do. Guarantees: damage is a finding, never an exception; what damage kept from
being looked at is a finding too, so silence means proof; nothing is written; tars are walked by the standard library's
``tarfile``, not by the code that wrote them.

Inside, in this order:
    findings.py    ``Finding``, ``Verification``, and their collector
    files.py       files by reference: there, whole, unchanged
    sample.py      which images are re-read, where not all are
    tars.py        one tar against its index, member by member
    rows.py        all indexes together: every image once, groups whole, shards where the trie puts them
    tables.py      class, reject and sample tables against the indexes
    manifests.py   manifests against counts and policy; E1 on an epoch
    pins.py        pins: readable, and what they keep is there
    prove.py       ``verify``: the above, in order
"""

from pipeline.verify.findings import Code, Finding, Verification
from pipeline.verify.prove import verify

__all__ = ["Code", "Finding", "Verification", "verify"]
