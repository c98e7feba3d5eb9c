"""Class-conditional picture sets: Fashion-MNIST and others in IDX files, and scikit-learn's digits."""

from fewstep.data.classes.dataset import class_samples, files_digest
from fewstep.data.classes.idx import read_idx
from fewstep.data.classes.settings import ClassPicturesSettings, class_names

__all__ = ["ClassPicturesSettings", "class_names", "class_samples", "files_digest", "read_idx"]
