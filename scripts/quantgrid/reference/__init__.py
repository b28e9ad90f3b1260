"""The language models that quantgrid ships: what they are, how they are trained, and the cards that say so. No job of a study imports this."""
