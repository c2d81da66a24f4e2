"""Results for people: one page, or the card of a model, as `vit-edge report` writes them."""

from vit_edge.report.card import write_model_card
from vit_edge.report.page import write_report

__all__ = ["write_model_card", "write_report"]
