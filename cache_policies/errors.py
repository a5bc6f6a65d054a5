"""The one error a user meets when a policy cannot be used."""


class PolicyError(ValueError):
    """A policy string, parameter or combination that is refused.

    The message always names what is allowed. It is a ``ValueError`` because that
    is what vLLM turns into an HTTP 400 at admission.
    """
