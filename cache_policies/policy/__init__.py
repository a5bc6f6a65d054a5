"""What a user may ask for: the policy string."""

from cache_policies.policy.policy import Method, Policy, parse, parse_method

__all__ = ["Method", "Policy", "parse", "parse_method"]
