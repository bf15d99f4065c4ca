"""What a user can do wrong, one class each. The command line prints the message and exits with 2.

Every message is one line that says what is wrong and how to mend it.
"""


class KVPruneError(Exception):
    """A mistake that the user can mend. Anything else that is raised is a fault of kvprune's."""


class UnknownSource(KVPruneError):
    """The source is no file, folder or hub id that can be read."""


class UnsupportedArchitecture(KVPruneError):
    """The model's attention has no descriptor in `kvprune.models`."""


class UnsupportedTarget(KVPruneError):
    """An engine that cannot serve a folder, or a folder that does not do what its record says."""


class UnsafeWeights(KVPruneError):
    """The checkpoint has pickle weights only."""


class BrokenCheckpoint(KVPruneError):
    """A file of a checkpoint is missing, truncated or not what was saved."""


class TokenizerMismatch(KVPruneError):
    """A text has tokens that the model's embedding has no row for."""


class NewerFolder(KVPruneError):
    """A pruned folder with the code of a newer kvprune."""


class UnknownText(KVPruneError):
    """A text name or file that cannot be found or read."""


class TextTooShort(KVPruneError):
    """The text has fewer tokens than were asked for."""


class UnreachableRatio(KVPruneError):
    """The ratio is outside what alignment and minimum width can reach."""


class PlanMismatch(KVPruneError):
    """A plan that is invalid or was made for another model."""


class OutputExists(KVPruneError):
    """The output folder holds something that must not be overwritten."""


class TooLittleMemory(KVPruneError):
    """Not even one block at a time has room."""


class NoSpace(KVPruneError):
    """The disk is full or the folder cannot be written."""


class NotFinite(KVPruneError):
    """NaN or infinity in a loss or in scores."""


class BadOption(KVPruneError):
    """An option's value is not one of those it can take."""


class CacheMismatch(KVPruneError):
    """A cache that was made without the token filter, or with another one."""


class HubRefused(KVPruneError):
    """The hub cannot be reached, or does not let this token write."""


class FilterMisuse(KVPruneError):
    """A model that a token filter cannot run: gradient mode, a second filter, outputs that are never computed."""
