"""Removing whole channels and heads: trace → groups → importance → plan → surgery, in that order."""
