"""Defaults of the mitigations' options. Standard library only: the registry states them too."""

DAMPING = 0.01  # of a second moment, relative to the mean of its diagonal (GPTQ, arXiv 2210.17323)
BLOCK_SIZE = 128  # columns rounded before their errors reach the others
SCALES = "static"  # scales of GPTQ, from the weight before the first rounding
BLOCK_SCALES = "mse"  # search of MR-GPTQ for the scales of float formats (arXiv 2509.23202)
GPTAQ_ALPHA = 0.25  # weight of the cross term (arXiv 2504.02692)
CORRECTION = 0.5  # share of the correction of QEP
CORRECTION_DAMPING = 1.0  # of the second moment in that correction, relative to the mean of its diagonal
RANK = 32  # of a low-rank term, and of the budget of sparse outliers and residual columns
METRIC = "plain"  # of the error that a low-rank term or sparse outliers reduce
ORDER = "maximum"  # of the inputs whose columns get second codes (SERQ, arXiv 2603.08185)
FACTORS = "bf16"  # format of the factors of a low-rank term
BRANCH_INPUT = "quantized"  # input of a low-rank term
SVDQUANT_ITERATIONS = 100  # of low_rank_first (SVDQuant, arXiv 2411.05007)
CALDERA_ITERATIONS = 20  # arXiv 2405.18886
# of singular_domain
SINGULAR_STEPS = 50
SINGULAR_LEARNING_RATE = 0.002  # in units of the singular values
BANDWIDTH = 1  # diagonals on either side of the main one
