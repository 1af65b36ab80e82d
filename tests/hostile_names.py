"""Labels that would do something if a page, a spreadsheet or a terminal took them for more than text."""

from __future__ import annotations

import re

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

STEERING = (
    "<img src=x onerror=alert(1)>",
    "=1+1",
    "@SUM(A1)",
    "-2",
    "+3",
    "a\u202egpj",
    "مرحبا \u2067بالعالم",
    "b\x1b[31mred\x1b]0;title\x07",
    "\x1b[2J\x1b[1;1Herror: your disk is gone",
    "\x9b31mC1",
    "c\nd",
    "over\rwritten",
    "back\x08\x08space",
    "\x7f\ufeff\u2028",
)
"""Names that a terminal would obey, or a spreadsheet compute. Also names of files: no slash, no zero byte."""

OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
"""What a terminal obeys, or what reorders text. A newline is not among them: it must be one of ours."""
