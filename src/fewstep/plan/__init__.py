"""What the real run of a recipe would take: FLOPs, memory, time and bytes, counted without GPU and weights."""

from fewstep.plan.data import DataPlan, plan_data_of, render_data
from fewstep.plan.gpus import GPUS, find_gpu
from fewstep.plan.plan import Plan, Step, plan_recipe
from fewstep.plan.render import render, summary
from fewstep.plan.shapes import Shape, shipped_shapes

__all__ = [
    "GPUS",
    "DataPlan",
    "Plan",
    "Shape",
    "Step",
    "find_gpu",
    "plan_data_of",
    "plan_recipe",
    "render",
    "render_data",
    "shipped_shapes",
    "summary",
]
