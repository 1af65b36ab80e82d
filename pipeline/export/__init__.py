"""Manifest -> what other tools read.

In: a manifest of a snapshot. Out: resampled WebDataset tars in the order of the epoch. Guarantees: every class appears
exactly as often as the manifest says; shards are equal in size and each is balanced in itself (E3); keys are unique;
every image is checked before it is written; an export that was cut off goes on where it stopped.
"""

from __future__ import annotations

from pipeline.export.tars import ExportCost, ExportPlan, ExportSummary, export_cost, export_tars, plan_export

__all__ = ["ExportCost", "ExportPlan", "ExportSummary", "export_cost", "export_tars", "plan_export"]
