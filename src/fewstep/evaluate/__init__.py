"""Judging students: features, distances with intervals, alignment, baselines, the report and the promotion gate."""

from fewstep.evaluate.alignment import AlignmentScorer, AlignmentSettings
from fewstep.evaluate.baselines import DpmSolverSettings, RowSpec
from fewstep.evaluate.compare import Comparison, compare
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.gate import GateDecision, GateSettings, decide
from fewstep.evaluate.report import ReportFiles, read_report, write_report
from fewstep.evaluate.schema import Report, Result, StageUsage
from fewstep.evaluate.settings import EvaluateSettings

__all__ = [
    "AlignmentScorer",
    "AlignmentSettings",
    "Comparison",
    "DpmSolverSettings",
    "EvaluateSettings",
    "GateDecision",
    "GateSettings",
    "Lite0Features",
    "Report",
    "ReportFiles",
    "Result",
    "RowSpec",
    "StageUsage",
    "compare",
    "decide",
    "read_report",
    "write_report",
]
