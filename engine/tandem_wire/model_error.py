"""Why a model can't be used, each with a remedy.

ModelSourceError (ValueError)
├── UnknownSourceError       the URI has no form that Tandem knows
├── ModelNotFoundError       nothing is there: no such path, package, repository or revision
├── ModelDownloadError       the hub can't be reached, or refuses
├── BadModelFileError        a file is damaged or incomplete
├── UnsupportedModelError    an architecture or feature that Tandem has no model for
└── CacheFolderError         there is no room for what is made of the files, or it can't be written
"""


class ModelSourceError(ValueError):
    """Root of the tree; `remedy` tells the user in one sentence what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.message = message
        self.remedy = remedy


class UnknownSourceError(ModelSourceError):
    """The URI has no form that Tandem knows."""


class ModelNotFoundError(ModelSourceError):
    """No such path, package, repository or revision."""


class ModelDownloadError(ModelSourceError):
    """The hub can't be reached, or refuses."""


class BadModelFileError(ModelSourceError):
    """A file of the model is damaged or incomplete."""


class UnsupportedModelError(ModelSourceError):
    """An architecture or feature that Tandem has no model for."""


class CacheFolderError(ModelSourceError):
    """What is made of a model's files can't be kept."""
