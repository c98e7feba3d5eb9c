"""The parts that a picture set is drawn in."""

from __future__ import annotations

from typing import Literal

#: train: what is trained on. evaluate: held-out pictures alone. alignment: further pictures like those of training,
#: which no generator is trained on, to fit the scorer of text alignment with; a set without captions has none.
Split = Literal["train", "evaluate", "alignment"]
SPLITS: tuple[Split, ...] = ("train", "evaluate", "alignment")
