"""Training of transform parameters: parametrizations, differentiable decoder, objectives, loop."""
