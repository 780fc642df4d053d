"""Builds the model and the data loaders of a run from its configuration."""

import torch

from lmfusion.conversion import load_base
from lmfusion.data.config import DataConfig
from lmfusion.data.pipeline.loader import PackedLoader
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.modeling import LMFusion
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World
from lmfusion.utils.recipes import resolve_path


def build_model(config: RunConfig) -> LMFusion:
    """The model of a run on the CPU, in the dtypes it was loaded with, its text tower frozen if the run says so."""
    model_config, train = config.model, config.train
    if model_config.adapted is not None:
        moved = None if model_config.base is None else resolve_path(model_config.base)
        # The image side keeps its dtype
        model = LMFusion.from_pretrained(resolve_path(model_config.adapted), moved, codec_path=model_config.codec_path)
    else:
        assert model_config.base is not None
        base = load_base(resolve_path(model_config.base), getattr(torch, train.dtype))
        image, codec, diffusion = model_config.image, model_config.codec, model_config.diffusion
        model = LMFusion.from_base(base, image, codec, diffusion, seed=train.seed)
    if model_config.chat_system_prompt is not None:
        model.config.chat_system_prompt = model_config.chat_system_prompt
    model.config.template_variables = {**model.config.template_variables, **model_config.template_variables}
    model.freeze_text(train.text_learning_rate_ratio == 0)
    model.recompute = train.recompute
    return model


def training_loader(config: RunConfig, model: LMFusion, world: World) -> PackedLoader:
    """The loader of the training data, with this rank's packed sequences of every step."""
    loader = _loader(config.data, config, model, world, config.sequences_per_step, frozen_text=model.frozen_text)
    if world.rank == 0:
        loader.report_unused()
    return loader


def validation_loader(data: DataConfig, config: RunConfig, model: LMFusion, world: World) -> PackedLoader:
    """A loader of `data` with all packed sequences on every rank, one per step, and labels for all text."""
    return _loader(data, config, model, World(0, 1, world.device), sequences_per_step=1, frozen_text=False)


def _loader(
    data: DataConfig, config: RunConfig, model: LMFusion, world: World, sequences_per_step: int, frozen_text: bool
) -> PackedLoader:
    if model.tokenizer is None:
        raise ValueError("the base LLM must have a tokenizer; put its tokenizer.json into the folder of its weights")
    return PackedLoader(
        data,
        codec=model.codec,
        tokenizer=model.tokenizer,
        tokens=SpecialTokens.of(model.tokenizer, model.boi_token_id),
        tokens_per_image=model.tokens_per_image,
        diffusion=model.diffusion.config,
        sequences_per_step=sequences_per_step,
        seed=config.train.seed,
        frozen_text=frozen_text,
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        vision=model.vision,
        template_variables={**model.config.template_variables, **data.date_variables},
    )
