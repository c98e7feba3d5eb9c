"""The paper's Table 1 in small: class-conditional pictures judged by a classifier that is trained here."""

from fewstep.evaluate.classes.classifier import ClassifierSettings, Judged, PictureClassifier
from fewstep.evaluate.classes.compare import (
    TABLE_STEPS,
    TABLE_WEIGHTS,
    ClassComparison,
    assemble_classes,
    compare_classes,
    table_specs,
)
from fewstep.evaluate.classes.jackknife import Measured
from fewstep.evaluate.classes.report import ClassReportFiles, read_class_report, write_class_report
from fewstep.evaluate.classes.rows import (
    ClassConditions,
    ClassRowOutcome,
    ClassSampler,
    RealPictures,
    make_class_conditions,
    measure_class_row,
    measure_real,
)
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassMethod, ClassReport, ClassResult, ClassRowSpec
from fewstep.evaluate.classes.settings import ClassCompareSettings
from fewstep.evaluate.classes.sliced import sliced_wasserstein
from fewstep.evaluate.classes.tables import all_tables, metric_table, to_markdown

__all__ = [
    "METHOD_NAMES",
    "TABLE_STEPS",
    "TABLE_WEIGHTS",
    "ClassCompareSettings",
    "ClassComparison",
    "ClassConditions",
    "ClassMethod",
    "ClassReport",
    "ClassReportFiles",
    "ClassResult",
    "ClassRowOutcome",
    "ClassRowSpec",
    "ClassSampler",
    "ClassifierSettings",
    "Judged",
    "Measured",
    "PictureClassifier",
    "RealPictures",
    "all_tables",
    "assemble_classes",
    "compare_classes",
    "make_class_conditions",
    "measure_class_row",
    "measure_real",
    "metric_table",
    "read_class_report",
    "sliced_wasserstein",
    "table_specs",
    "to_markdown",
    "write_class_report",
]
