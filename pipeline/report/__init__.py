"""One self-contained HTML page about a snapshot: how imbalanced it is, and what the manifests do about it.

Comes in: a ROOT, a snapshot number. Goes out: a page in reports/, or in a file of the caller's choice. Guarantees: the
page opens no connection and runs no script but its own (its Content-Security-Policy says so); names, paths and messages
from the source are text in it and nothing else, invisible and direction-changing characters spelled out; pictures in it
are pixels that this room encoded anew; equal snapshots give equal pages.

Inside, in this order:
    chart.py       counts and targets -> the lines of the class curve
    pictures.py    image bytes -> a thumbnail
    page.py        a snapshot -> what the page shows, and ``write_report``
    page.html, page.css, page.js
"""

from pipeline.report.page import write_report

__all__ = ["write_report"]
