"""The boxes of the picture in docs/architecture.md: one short file a stage, tying the rooms together.

Nothing is imported here: a process of the cluster that does one small thing shall not load all stages for it.
"""
