"""What sampling says about a model, and about a trained one beside its base; needs the extra `eval`.

tasks: problems with a verifier; math_judge, gym_scores: verifiers. generate: responses, cached. statistics: estimators
and intervals. compare: one model, and two. verdict: what it says of the answers. counts, counted: the same from counts
of right responses. semantic, utility: further diagnostics. command: `hclm-rl eval`.
"""

REPORT_NAME = "report.json"  # in the folder that `hclm-rl eval` writes, which may be the model's own
