"""What the real run of a recipe would take: FLOPs, memory, time and bytes, counted without GPU and weights."""

from fewstep.plan.gpus import GPUS, find_gpu
from fewstep.plan.plan import Plan, Step, plan_recipe
from fewstep.plan.render import render, summary
from fewstep.plan.shapes import Shape, shipped_shapes

__all__ = ["GPUS", "Plan", "Shape", "Step", "find_gpu", "plan_recipe", "render", "shipped_shapes", "summary"]
