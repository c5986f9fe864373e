"""What `bench.fuzz` and the tests feed with bytes: each parser and each judge of bytes from a stranger, as a target.

A target takes any bytes and returns. Some hand them to a parser as they are; others read them as a list of choices by
which an honest message is altered, and signed anew with a cheat's own key, so that they get past the signature. What
a target raises is a finding: an error that the code does not declare, a verdict against the wrong party, more memory
or more time than the input explains (`guard`).
"""
