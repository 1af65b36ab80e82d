"""Labels that would do something if a page, a spreadsheet or a terminal took them for more than text."""

from __future__ import annotations

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "'\"><img src=x onerror=alert(3)>",
    "<!--<script>",
    "{{ 7 * 7 }} {% raw %}",
    "]]></svg><style>*{display:none}</style>",
    "javascript:alert(4)",
    "gpj.\u202etxt.exe\u2066",
    "bell\x07 \u2028line",
    "Ünïcödé 🍎",
    "=1+1",
    "@SUM(A1)",
    "مرحبا بالعالم",
    "</script x",
    "long " + "name " * 200,
)

"""Markup, templates, formulas, right-to-left text, hidden characters, and one that is too long to show."""
