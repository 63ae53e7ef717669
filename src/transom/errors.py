"""Every error that a user can meet. Each message says what is wrong, where, and what to do."""

import re


class TransomError(Exception):
    """Base of all errors that bad input or a missing part can cause; the CLI turns it into exit code 2.

    Attributes:
        lines: Whether the message is a list of several lines. Elsewhere line ends can only come from names and values
            that it quotes, and are written as escapes.
    """

    lines = False

    def __init__(self, message: str) -> None:
        super().__init__(message if self.lines else _BREAKS.sub(_escaped, message))


_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


class ConfigError(TransomError):
    """A model configuration is unknown, incomplete or contradicts itself."""


class CheckpointError(TransomError):
    """A checkpoint is truncated, corrupt, or does not hold the tensors that the model needs."""


class TokenizerError(TransomError):
    """Tokenizer files are missing or malformed, or a conversation breaks the chat template's rules."""


class ImageError(TransomError):
    """An image cannot be read, is larger than any that are taken, or what reads images is not installed."""


class PairsError(TransomError):
    """A file of pairs of images and texts cannot be read, or a line of it is no pair."""


class TraceError(TransomError):
    """A model could not be traced to a graph."""


class InvariantError(TransomError):
    """A graph breaks the IR's rules, or a pass lied about what it did."""


class UnsupportedOpsError(TransomError):
    """A graph holds operations that the target cannot lower; all of them are named at once."""

    lines = True


class DialectError(TransomError):
    """A model breaks rules of the runtime that it is for; all breaches are named at once."""

    lines = True


class QuantizationError(TransomError):
    """A quantisation scheme is unknown, or cannot hold a tensor."""


class RangeError(TransomError):
    """Numbers leave the range of a dtype where computing in a wider one does not help."""


class ArtifactError(TransomError):
    """An artifact folder is missing, damaged, or of a version that this library does not read."""


class TargetError(TransomError):
    """A target is unknown, or what it needs to run is not installed."""


class BuildError(TransomError):
    """A vendor's builder could not make an engine of an artifact."""

    lines = True


class ContextLengthError(TransomError):
    """More tokens were asked for than the artifact's context holds."""


class SessionError(TransomError):
    """A session's caches do not hold what the caller goes on from, or its runtime failed."""


class NonFiniteError(SessionError):
    """A run computed logits that are NaN or infinite, so that no token follows from them."""


class SamplingError(TransomError):
    """A sampling setting is out of range, or logits are no numbers to choose by."""


class PlotError(TransomError):
    """What draws plots is not installed."""


class TrainingError(TransomError):
    """A training run cannot begin, go on or end: a missing device, a state of another run, a loss that is no number."""


class RewardError(TransomError):
    """Rewards cannot be computed: a reward is unknown, a tool or part of the data is missing, or too many fail."""
