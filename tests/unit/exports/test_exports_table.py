"""The table of docs/reference/exports.md is that of the rules."""

from __future__ import annotations

from export_table import DOCUMENT, document, verdicts
from quantgrid.exports.verdicts import BOUND, EXACT, REFUSED


def test_the_document_is_what_the_rules_say():
    assert DOCUMENT.read_text() == document(), "run python tests/export_table.py"


def test_every_refusal_names_a_recipe_and_every_other_verdict_a_loader():
    for preset, row in verdicts().items():
        for target, verdict in row.items():
            assert verdict.kind in (EXACT, BOUND, REFUSED)
            if verdict.kind == REFUSED:
                assert all("nearest: " in reason for reason in verdict.refusals), (preset, target)
                assert not verdict.loaders
            else:
                assert verdict.loaders, (preset, target)
            if verdict.kind == BOUND:
                assert max(verdict.kl, verdict.served_kl) > 0, (preset, target)
