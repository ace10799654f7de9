"""What effinfer raises beside ValueError and TypeError for bad arguments."""


class EffinferError(Exception):
    """Base of every error of this package."""


class UnsupportedModelError(EffinferError):
    """The model, or a part that had to be patched, is not one effinfer knows."""


class UnsupportedOpError(EffinferError):
    """No kernel takes this combination of arguments; the message lists each kernel's reason."""


class PatchConflictError(EffinferError):
    """Something else already changed the module, or it is patched already."""


class VerificationError(EffinferError):
    """A patched model did not reproduce the stock model; it was restored."""


class BackendUnavailableError(EffinferError):
    """The wanted backend is not in this build or not on this machine."""
