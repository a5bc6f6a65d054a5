"""What a user may ask for: the policy string."""

from cache_policies.policy.policy import Method, Policy, method_classes, parse, parse_method

__all__ = ["Method", "Policy", "method_classes", "parse", "parse_method"]
