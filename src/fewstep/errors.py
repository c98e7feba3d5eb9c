"""What a user can do wrong, in words.

Every message names the value, the rule that it breaks and what to change.
The command line prints the message alone and ends with status 2; a stack trace is for faults of ours.
"""


class FewstepError(Exception):
    """Base of all errors that a user can cause and mend."""


class RecipeError(FewstepError, ValueError):
    """A recipe, or a setting in it, that cannot work."""


class StorageError(FewstepError):
    """An object store or a path that cannot be read or written."""


class DataError(FewstepError):
    """Shards, samples or metadata that cannot be used."""


class ModelError(FewstepError):
    """A model folder that is incomplete or does not fit its use."""


class CheckpointError(FewstepError):
    """A checkpoint that is missing, damaged or of another recipe."""


class SamplingError(FewstepError, ValueError):
    """A prompt, step count, guidance scale or size that the model was not made for."""


class TrackingError(FewstepError):
    """MLflow, or what is registered there, cannot be reached or is not what it should be."""
