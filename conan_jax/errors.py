"""Errors a user can cause, and the exit codes that schedulers read.

Every command ends with one of four codes: 0 done, 42 stopped but resumable (start the same
command again), 78 wrong configuration or data (restarting cannot help), and 1 for a check that
failed (`conan verify`) or an error that is none of ours, with its traceback.
"""

EXIT_DONE = 0
EXIT_RESUMABLE = 42
EXIT_BAD_INPUT = 78


class ConanError(Exception):
    """Base of the errors shown without a traceback: what is wrong, where, and what to do."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(ConanError):
    """A configuration value is unknown, ill-typed or contradicts another one."""


class DataError(ConanError):
    """A file, a record or a shard is not what it must be."""


class CheckpointError(ConanError):
    """A checkpoint is missing, damaged, or belongs to another tokenizer or configuration."""


class TrainingError(ConanError):
    """Training cannot go on, for instance after repeated non-finite updates."""


class Preempted(ConanError):
    """The run was asked to stop; its state is saved and the same command resumes it."""

    exit_code = EXIT_RESUMABLE


class PeerError(ConanError):
    """Another process of the same run failed, ended, or cannot be reached; carries the exit code to end with alike."""

    def __init__(self, message: str, exit_code: int = EXIT_RESUMABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code
