"""One self-contained HTML page about a snapshot: how imbalanced it is, and what the manifests do about it.

Comes in: a ROOT, a snapshot number. Goes out: a page in reports/, or in a file of the caller's choice. Guarantees: the
page opens no connection and runs no script but its own (its Content-Security-Policy says so); names, paths and messages
from the source are text in it and nothing else, invisible and direction-changing characters spelled out; pictures in it
are pixels that this room encoded anew; equal snapshots give equal pages.

Inside, in this order:
    words.py       names as text that reads as it is; counts and sizes for people
    numbers.py     classes, groups, splits, manifests; what can be evaluated
    survey.py      one look at the indexes: sizes, formats, related images
    chart.py       counts and targets -> curves
    pictures.py    verified bytes -> a thumbnail
    refused.py     rejects by reason; copies and label conflicts
    changes.py     the difference to the snapshot before
    advice.py      what to do next, and the number that says so
    html.py        what every page is made with
    page.py        all of it -> ``write_report``
    evaluation.py  an evaluation of a model -> ``write_evaluation``, by evaluation.html
    built.py       the page of a build
    trained.py     the page of a training, with trained.html
    page.html, page.css, page.js
"""

from pipeline.report.built import write_build_report
from pipeline.report.evaluation import write_evaluation
from pipeline.report.page import write_report
from pipeline.report.trained import write_training_page

__all__ = ["write_build_report", "write_evaluation", "write_report", "write_training_page"]
