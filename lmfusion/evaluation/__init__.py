"""Evaluation of a trained model: language, image generation, captioning, and instruction following.

`lmfusion.evaluation.run` runs the suites of a recipe; `lmfusion eval` is its command. Suites are in
`lmfusion.evaluation.suites`, whose `Suite` says what one consists of, and their metrics in
`lmfusion.evaluation.metrics`.
"""
