"""Where the tests of attention take it from."""

from axialtrain.bench.peak import Peak

__all__ = ["Peak"]
