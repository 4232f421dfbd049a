"""What a check says: one thing that is wrong, or that a person should know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`rule` names the rule, `message` what it met and what to do. One that is not `serious` does not keep a launch from starting."""

    rule: str
    message: str
    serious: bool = True
