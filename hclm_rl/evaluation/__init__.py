"""What sampling says about a model, and about a trained one beside its base; needs the extra `eval`.

tasks: problems with a verifier; math_judge, gym_scores: verifiers. generate: responses, cached. statistics: estimators
and intervals. compare: one model, and two. verdict: healthy, warning or collapsed. semantic, utility: further
diagnostics. command: `hclm-rl eval`.
"""
