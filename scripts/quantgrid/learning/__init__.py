"""How the parameters of a transform are learned: their free forms, the differentiable decoder, objectives, the training itself."""
