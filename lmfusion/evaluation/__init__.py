"""How good is a trained model? Suites that score its language, images, captions and obedience, each on its own.

A suite is a module of this package: a dataclass of its settings (`LanguageConfig`), `run_language(model, config,
folder)` that answers with a `SuiteResult`, and, where data, weights or packages are needed, `check_language(config)`,
which looks for them before anything slow happens. `lmfusion.evaluation.run` puts suites together; `lmfusion eval` is
its command.
"""
